"""Bytes on the GPU of a rank, by pipeline stage and by what they are of."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from megapsft.cluster.activations import chunks_in_flight, layer_bytes
from megapsft.cluster.efficiency import Execution, imbalance
from megapsft.cluster.fp8 import added_by_fp8
from megapsft.cluster.sizes import DIVISIBLE, Parameters, of_stage, replicas, round_up, trained_of_stage
from megapsft.cluster.workload import Workload
from megapsft.config import Config
from megapsft.models.hf_config import HFConfig
from megapsft.models.kv_cache import GROWTH
from megapsft.parallel import Mesh
from megapsft.platform.chips import GIB
from megapsft.policy.build import DTYPES, padded_vocab_size

RUNTIME = 3 * GIB  # CUDA's context, NCCL's channels, workspaces of cuBLAS and cuDNN
USABLE = 0.94  # of the GPU's memory: the allocator loses the rest to fragments
MASTER, MOMENTS, GRADIENT = 4, 8, 4  # bytes a parameter of an fp32 copy, of Adam's two moments, of an fp32 gradient


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes that a model in training holds from its first step to its last."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes on each rank of one pipeline stage, at the worst moment of a step."""

    parameters: float  # with what Transformer Engine keeps of them in FP8
    gradients: float
    optimizer: float
    reference: float  # a second model, where reference.placement=copy; what is kept for a KL of the full vocabulary
    critic: float  # its parameters, gradients and optimizer
    activations: float  # of the microbatches in flight, and of the layer whose gradient is computed
    head: float  # slabs of logits, gradients of the output layer and of what it reads
    communication: float  # what is gathered, exchanged between experts, received from other stages
    kv_cache: float  # of responses that are sampled in this process; activations are not there then
    runtime: float

    @property
    def training(self) -> float:
        return self.activations + self.head + self.communication

    @property
    def total(self) -> float:
        return self.held + max(self.training, self.kv_cache) + self.runtime

    @property
    def held(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.reference + self.critic


ROWS = tuple(field.name for field in fields(StageMemory))


def held(chunks: tuple[Parameters, ...], mesh: Mesh, dtype: str, sharded: bool) -> Held:
    """What Megatron allocates for parameters, fp32 gradients and AdamW of these model chunks.

    fp32 models are their own main parameters. Under ZeRO-1 (`sharded`) parameters and gradients lie in padded buffers, of whose
    optimizer state each rank has its equal part.
    """
    itemsize = DTYPES[dtype].itemsize
    state = MOMENTS + (0 if dtype == "float32" else MASTER)
    if not sharded:
        numbers = sum(chunk.total for chunk in chunks)
        return Held(parameters=numbers * itemsize, gradients=numbers * GRADIENT, optimizer=numbers * state)
    buffers, shards = 0, 0
    for chunk in chunks:
        for numbers, ranks in zip((chunk.dense, chunk.expert), replicas(mesh), strict=True):
            buffer = round_up(numbers.aligned, math.lcm(ranks, DIVISIBLE))
            buffers, shards = buffers + buffer, shards + buffer // ranks
    return Held(parameters=buffers * itemsize, gradients=buffers * GRADIENT, optimizer=shards * state)


def held_by_policy(config: Config, hf: HFConfig, mesh: Mesh, stage: int) -> Held:
    """Of the ranks of `stage`. Where adapters are trained only they have gradients and an optimizer."""
    dtype, divisible_by = config.model.dtype, config.model.make_vocab_size_divisible_by
    trained = trained_of_stage(hf, mesh, divisible_by, config.lora, stage)
    found = held(trained, mesh, dtype, config.parallel.use_distributed_optimizer)
    if config.lora.rank is None:
        return found
    frozen = sum(chunk.total for chunk in of_stage(hf, mesh, divisible_by, stage))
    return replace(found, parameters=found.parameters + frozen * DTYPES[dtype].itemsize)


def stage_memory(
    config: Config, hf: HFConfig, mesh: Mesh, work: Workload, stage: int, execution: Execution, capability: tuple[int, int]
) -> StageMemory:
    """Of the ranks of `stage`, counted from 0.

    Args:
        capability: of their GPUs.
    """
    model, parallel, itemsize = config.model, config.parallel, DTYPES[config.model.dtype].itemsize
    chunks = of_stage(hf, mesh, model.make_vocab_size_divisible_by, stage)
    policy = held_by_policy(config, hf, mesh, stage)
    trained, compared = (added_by_fp8(config, hf, mesh, stage, capability, trained) for trained in (True, False))
    layer = layer_bytes(hf, mesh, parallel, itemsize, imbalance(hf.num_experts or 1, mesh.ep, execution))
    tokens, layers = work.positions // mesh.cp, hf.num_hidden_layers // (mesh.pp * mesh.vpp)
    working = layer.whole - layer.kept + layer.mlp  # of the one layer: what is recomputed, and the gradients in its MLP
    kept = chunks_in_flight(mesh, stage, work.microbatches) * layers * layer.kept
    activations = max(tokens * (kept + working), work.at_once * tokens * layer.whole)
    return StageMemory(
        parameters=policy.parameters + trained,
        gradients=policy.gradients,
        optimizer=policy.optimizer,
        reference=_reference(config, hf, mesh, work, stage, chunks, itemsize, compared),
        critic=policy.total + trained if work.critic else 0,
        activations=activations,
        head=_head(config, hf, mesh, tokens, itemsize) if stage == mesh.pp - 1 else 0,
        communication=_communication(hf, mesh, tokens, itemsize),
        kv_cache=_kv_cache(config, hf, mesh, work, itemsize),
        runtime=RUNTIME,
    )


def _reference(
    config: Config,
    hf: HFConfig,
    mesh: Mesh,
    work: Workload,
    stage: int,
    chunks: tuple[Parameters, ...],
    itemsize: int,
    in_fp8: float,
) -> float:
    """`in_fp8`: what its copies of weights in FP8 add, where it has weights of its own."""
    if not work.reference_passes:
        return 0
    copied = config.reference.placement == "copy"
    found = sum(chunk.total for chunk in chunks) * itemsize + in_fp8 if copied else 0
    if "ref_hidden" in work.phase.objective.needs and stage == mesh.pp - 1:
        positions = work.updates * work.microbatches * work.positions / mesh.cp
        found += positions * hf.hidden_size * itemsize / (mesh.tp if mesh.sequence_parallel else 1)
        if not copied and config.lora.rank is None:  # with adapters it is the policy's
            found += _vocabulary(config, hf, mesh) * itemsize  # the reference's output layer, for the update
    return found


def _vocabulary(config: Config, hf: HFConfig, mesh: Mesh) -> int:
    """Numbers of a rank's part of the output layer."""
    return padded_vocab_size(hf.vocab_size, config.model.make_vocab_size_divisible_by, mesh.tp) // mesh.tp * hf.hidden_size


def _head(config: Config, hf: HFConfig, mesh: Mesh, tokens: int, itemsize: int) -> float:
    """Of the last stage: the hidden states whole, their gradient in fp32 too; the weight's gradient; logits or slabs of them."""
    vocabulary = _vocabulary(config, hf, mesh)
    logits = 3 * 4 * tokens * vocabulary // hf.hidden_size  # fp32, their exponentials, their gradient
    slabs = logits if config.model.logprob_backend == "reference" else min(logits, 2 * config.model.logprob_chunk_bytes)
    gradient = 0 if config.lora.rank is not None else vocabulary * itemsize
    return tokens * hf.hidden_size * (2 * itemsize + 4) + gradient + slabs


def _communication(hf: HFConfig, mesh: Mesh, tokens: int, itemsize: int) -> float:
    hidden = tokens * hf.hidden_size * itemsize
    found = 0.0
    if mesh.sequence_parallel:
        found += 2 * hidden  # gathered forward, and its gradient
    if mesh.cp > 1:
        found += 2 * 2 * tokens * hf.num_key_value_heads * hf.head_dim * itemsize / mesh.tp  # keys and values, one more block
    if mesh.ep > 1:
        found += 2 * hidden * hf.num_experts_per_tok / mesh.tp  # sent and received
    if mesh.pp > 1:
        found += 2 * mesh.vpp * hidden / (mesh.tp if mesh.sequence_parallel else 1)
    return found


def _kv_cache(config: Config, hf: HFConfig, mesh: Mesh, work: Workload, itemsize: int) -> float:
    """Room for keys and values of rollout.max_batch_size responses, which grows by GROWTH when it is full."""
    if not work.requests or config.rollout.engine != "inprocess":
        return 0
    numbers = 2 * hf.num_key_value_heads * hf.head_dim * hf.num_hidden_layers / (mesh.tp * mesh.pp)
    responses = min(config.rollout.max_batch_size, -(-work.requests // (mesh.dp * mesh.cp)))
    return GROWTH * responses * work.length * numbers * itemsize
