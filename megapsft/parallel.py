"""The mesh: how many ranks each kind of parallelism takes, checked before any process starts, then made into groups.

`plan_mesh` is arithmetic on plain numbers and needs no process group; `initialize` makes Megatron's groups of it.
"""

from __future__ import annotations

import datetime
import math
import os
from dataclasses import dataclass, replace

from megapsft.config import ParallelConfig
from megapsft.errors import Refused

RECOMPUTE_MODULES = ("core_attn", "mlp", "moe", "layernorm")  # those that run with and without Transformer Engine


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The numbers of a model that a split must divide."""

    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    num_experts: int | None = None


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Sizes of a checked split. tp * pp * cp * dp == world_size == etp * ep * pp * (expert data parallel)."""

    world_size: int
    tp: int
    pp: int
    vpp: int  # virtual stages a rank; 1 without interleaving
    cp: int
    dp: int
    ep: int
    etp: int
    sequence_parallel: bool
    overlap_p2p_comm: bool
    batch_p2p_comm: bool

    def describe(self) -> str:
        sizes = {"tp": self.tp, "pp": self.pp, "vpp": self.vpp, "cp": self.cp, "ep": self.ep, "etp": self.etp, "dp": self.dp}
        usual = dict.fromkeys(sizes, 1) | {"etp": self.tp, "dp": None}
        text = " ".join(f"{name}={size}" for name, size in sizes.items() if size != usual[name])
        return text + (" sp" if self.sequence_parallel else "")


def smallest_world(parallel: ParallelConfig) -> int:
    """The fewest ranks on which this split can run."""
    tp, etp = parallel.tensor_model_parallel_size, parallel.expert_tensor_parallel_size
    dense = tp * parallel.context_parallel_size
    expert = (etp or tp) * parallel.expert_model_parallel_size
    return math.lcm(dense, expert) * parallel.pipeline_model_parallel_size


def plan_mesh(parallel: ParallelConfig, world_size: int, model: ModelShape, on_cuda: bool, dispatcher: str = "alltoall") -> Mesh:
    """Check that `parallel` fits the world and the model.

    Raises:
        Refused: a size that does not divide; a layout that Megatron would compute wrongly in silence, or cannot run here.
    """
    tp, pp, cp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.context_parallel_size
    vpp, ep = parallel.virtual_pipeline_model_parallel_size or 1, parallel.expert_model_parallel_size
    etp = parallel.expert_tensor_parallel_size or tp

    _check_model(parallel, model, tp, pp, vpp, ep, etp)
    _check_world(world_size, parallel, tp * pp * cp, etp * ep * pp)
    sequence_parallel = _sequence_parallel(parallel, model, tp)
    if model.num_experts:
        _check_experts(tp, ep, etp, gathers_evenly=not on_cuda and dispatcher == "alltoall")
    overlap_p2p, batch_p2p = _p2p(parallel, vpp)
    _check_options(parallel, model)
    return Mesh(
        world_size=world_size, tp=tp, pp=pp, vpp=vpp, cp=cp, dp=world_size // (tp * pp * cp), ep=ep, etp=etp,
        sequence_parallel=sequence_parallel, overlap_p2p_comm=overlap_p2p, batch_p2p_comm=batch_p2p,
    )  # fmt: skip


def _check_world(world_size: int, parallel: ParallelConfig, dense: int, expert: int) -> None:
    fit, pp = smallest_world(parallel), parallel.pipeline_model_parallel_size
    tp, cp, ep = parallel.tensor_model_parallel_size, parallel.context_parallel_size, parallel.expert_model_parallel_size
    for size, kinds in (
        (dense, f"tensor {tp} x pipeline {pp} x context {cp}"),
        (expert, f"expert tensor {expert // (ep * pp)} x expert {ep} x pipeline {pp}"),
    ):
        if world_size % size:
            raise Refused(
                f"world size {world_size}",
                f"must be a multiple of {kinds} = {size}",
                f"start {fit} processes, or a multiple (--nproc-per-node {fit})",
            )


def _check_experts(tp: int, ep: int, etp: int, gathers_evenly: bool) -> None:
    if ep == 1 and etp != tp:
        raise Refused(
            f"expert_tensor_parallel_size={etp} with expert_model_parallel_size=1",
            f"must equal tensor_model_parallel_size={tp}: Megatron marks experts as such only where they are split over ranks, "
            "so their gradients would silently not be reduced",
            f"use expert_tensor_parallel_size={tp}, or expert_model_parallel_size=2 or more",
        )
    if ep > 1 and etp > 1 and gathers_evenly:
        raise Refused(
            f"expert_tensor_parallel_size={etp} with expert_model_parallel_size={ep} and alltoall dispatch",
            "needs an uneven all-gather, which gloo lacks",
            "use expert_tensor_parallel_size=1, or model.moe_token_dispatcher_type=allgather",
        )


def _p2p(parallel: ParallelConfig, vpp: int) -> tuple[bool, bool]:
    """(overlap_p2p_comm, batch_p2p_comm) of the pipeline."""
    overlap_p2p = vpp > 1 if parallel.overlap_p2p_comm is None else parallel.overlap_p2p_comm
    batch_p2p = not overlap_p2p if parallel.batch_p2p_comm is None else parallel.batch_p2p_comm
    if vpp > 1 and (batch_p2p or not overlap_p2p):
        raise Refused(
            f"overlap_p2p_comm={overlap_p2p}, batch_p2p_comm={batch_p2p} with virtual pipeline stages",
            "two transfers between the same two ranks in one batch are matched in order, which gives wrong gradients in silence",
            "leave both out, or use overlap_p2p_comm=true batch_p2p_comm=false",
        )
    if overlap_p2p and batch_p2p:
        raise Refused("overlap_p2p_comm=True, batch_p2p_comm=True", "exclude each other", "leave batch_p2p_comm out")
    return overlap_p2p, batch_p2p


def _check_options(parallel: ParallelConfig, model: ModelShape) -> None:
    if parallel.overlap_param_gather and not (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce):
        raise Refused(
            "overlap_param_gather=True",
            "needs use_distributed_optimizer and overlap_grad_reduce",
            "set both to true, or overlap_param_gather=false",
        )
    if parallel.recompute_granularity == "selective" and not parallel.recompute_modules:
        raise Refused("recompute_modules=[]", "names nothing to recompute", "use some of " + ", ".join(RECOMPUTE_MODULES))
    if parallel.recompute_granularity == "selective" and "moe" in parallel.recompute_modules and not model.num_experts:
        raise Refused("recompute_modules=moe", "the model has no experts", "use core_attn, mlp or layernorm")
    unknown = [name for name in parallel.recompute_modules if name not in RECOMPUTE_MODULES]
    if unknown:
        raise Refused(f"recompute_modules={unknown[0]}", "is not known", "use some of " + ", ".join(RECOMPUTE_MODULES))


def _check_model(parallel: ParallelConfig, model: ModelShape, tp: int, pp: int, vpp: int, ep: int, etp: int) -> None:
    heads = {"num_attention_heads": model.num_attention_heads, "num_query_groups (key-value heads)": model.num_query_groups}
    ffn = {"ffn_hidden_size": model.ffn_hidden_size}
    _divides("tensor_model_parallel_size", tp, heads if model.num_experts else heads | ffn)
    if vpp > 1 and pp == 1:
        raise Refused(
            f"virtual_pipeline_model_parallel_size={vpp}",
            "needs pipeline_model_parallel_size > 1",
            "leave it out, or split the layers over 2 ranks or more",
        )
    if vpp > 1:
        _divides("pipeline x virtual pipeline size", pp * vpp, {"num_layers": model.num_layers})
    _divides("pipeline_model_parallel_size", pp, {"num_layers": model.num_layers})
    if model.num_experts is None:
        if ep > 1 or parallel.expert_tensor_parallel_size not in (None, tp):
            raise Refused(
                f"expert_model_parallel_size={ep}, expert_tensor_parallel_size={etp}",
                "the model has no experts",
                "leave both out",
            )
    else:
        _divides("expert_model_parallel_size", ep, {"num_experts": model.num_experts})
        _divides("expert_tensor_parallel_size", etp, {"moe ffn_hidden_size": model.ffn_hidden_size})


def _sequence_parallel(parallel: ParallelConfig, model: ModelShape, tp: int) -> bool:
    needed = model.num_experts is not None and tp > 1
    if parallel.sequence_parallel and tp == 1:
        raise Refused("sequence_parallel=True", "needs tensor_model_parallel_size > 1", "set sequence_parallel=false")
    if needed and parallel.sequence_parallel is False:
        raise Refused(
            "sequence_parallel=False",
            f"Megatron trains experts under tensor_model_parallel_size={tp} only with sequence parallelism",
            "leave sequence_parallel out, or set it to true",
        )
    return needed or bool(parallel.sequence_parallel)


def _divides(name: str, size: int, numbers: dict[str, int]) -> None:
    common = math.gcd(*numbers.values())
    for of, number in numbers.items():
        if number % size:
            fit = [str(n) for n in range(1, common + 1) if common % n == 0 and n <= 128]
            raise Refused(f"{name}={size}", f"must divide {of}={number}", "use " + ", ".join(fit))


def with_overlap(parallel: ParallelConfig, on_gpus: bool, swapped: bool) -> ParallelConfig:
    """`parallel` with what is left open decided: communication of the distributed optimizer is hidden behind GPUs' arithmetic.

    Args:
        swapped: a reference is exchanged with the policy, whose parameters may then not be on their way.
    """
    hidden = on_gpus and parallel.use_distributed_optimizer
    reduce = hidden if parallel.overlap_grad_reduce is None else parallel.overlap_grad_reduce
    gather = parallel.overlap_param_gather
    gather = hidden and reduce and not swapped if gather is None else gather
    return replace(parallel, overlap_grad_reduce=reduce, overlap_param_gather=gather)


def initialize(mesh: Mesh, parallel: ParallelConfig, seed: int) -> None:
    """Join torch.distributed (NCCL on CUDA, gloo otherwise), make Megatron's groups, seed Megatron's generators."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not torch.distributed.is_initialized():
        timeout = datetime.timedelta(minutes=parallel.timeout_minutes)
        # one process has nobody to meet: no port, which another program may take before it is used, and which all could reach
        alone = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1} if mesh.world_size == 1 else {}
        torch.distributed.init_process_group("nccl" if on_cuda else "gloo", timeout=timeout, **alone)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=mesh.tp,
        pipeline_model_parallel_size=mesh.pp,
        virtual_pipeline_model_parallel_size=mesh.vpp if mesh.vpp > 1 else None,
        context_parallel_size=mesh.cp,
        expert_model_parallel_size=mesh.ep,
        expert_tensor_parallel_size=mesh.etp,
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)  # needed without dropout too: recomputation forks this generator


def shutdown() -> None:
    """Leave the groups, in order, so that gloo does not complain of peers that went away."""
    import torch
    from megatron.core import parallel_state

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
