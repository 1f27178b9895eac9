"""Floating-point operations of a microbatch in a pipeline stage, and how long they take."""

from __future__ import annotations

from dataclasses import dataclass

from megapsft.cluster.efficiency import ATTENTION, EXPERTS, HBM, LINEAR, Execution, imbalance
from megapsft.cluster.memory import GRADIENT, MASTER, MOMENTS
from megapsft.cluster.workload import Workload
from megapsft.config import Config
from megapsft.errors import Refused
from megapsft.models.flops import BACKWARD, active_per_token
from megapsft.models.hf_config import HFConfig
from megapsft.parallel import Mesh
from megapsft.platform.chips import GPU
from megapsft.policy.build import padded_vocab_size


@dataclass(frozen=True, kw_only=True)
class Operations:
    """FLOP on one rank, a multiplication and an addition counting as two."""

    linear: float = 0.0
    attention: float = 0.0
    experts: float = 0.0
    head: float = 0.0

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.experts + self.head

    def __add__(self, other: Operations) -> Operations:
        return Operations(**{name: getattr(self, name) + getattr(other, name) for name in KINDS})

    def __mul__(self, times: float) -> Operations:
        return Operations(**{name: getattr(self, name) * times for name in KINDS})

    def only(self, *kinds: str) -> Operations:
        return Operations(**{kind: getattr(self, kind) for kind in kinds})


KINDS = ("linear", "attention", "experts", "head")


def layer_forward(hf: HFConfig, mesh: Mesh, work: Workload) -> Operations:
    """One layer over a microbatch. Causal attention: a token sees half of its sample on average."""
    tokens = work.positions / mesh.cp
    dense, experts = active_per_token(hf)
    queries = hf.num_attention_heads * hf.head_dim
    return Operations(
        linear=2 * tokens * dense / mesh.tp,
        attention=4 * tokens * queries * work.length / 2 / mesh.tp,
        experts=2 * tokens * experts / mesh.tp,
    )


def layer_again(forward: Operations, hf: HFConfig, config: Config) -> Operations:
    """What of a layer is computed a second time in its backward pass."""
    parallel = config.parallel
    if parallel.recompute_granularity is None:
        return Operations()
    if parallel.recompute_granularity == "full":
        return forward
    again = forward.only("attention") if "core_attn" in parallel.recompute_modules else Operations()
    if "moe" in parallel.recompute_modules:
        again += forward.only("experts")
    if "mlp" in parallel.recompute_modules and not hf.num_experts:
        dense, _ = active_per_token(hf)
        again += forward.only("linear") * (3 * hf.hidden_size * hf.intermediate_size / dense)
    return again


def head_forward(hf: HFConfig, mesh: Mesh, work: Workload, divisible_by: int) -> Operations:
    """The output layer over a microbatch."""
    vocabulary = padded_vocab_size(hf.vocab_size, divisible_by, mesh.tp)
    return Operations(head=2 * work.positions / mesh.cp * vocabulary * hf.hidden_size / mesh.tp)


def head_again(forward: Operations, config: Config) -> Operations:
    """Slabs of logits are made again for their gradient."""
    return forward * (config.model.logprob_backend != "reference")


def backward(forward: Operations, frozen: bool) -> Operations:
    """Gradients of inputs and of weights; where these are frozen, of inputs alone. Those of adapters are left out."""
    return forward * BACKWARD if not frozen else forward + forward.only("attention")


def seconds(done: Operations, hf: HFConfig, mesh: Mesh, gpu: GPU, execution: Execution) -> float:
    """On the rank that experts load most.

    Raises:
        Refused: FP8 on a GPU that has none.
    """
    if execution.fp8 and gpu.fp8 is None:
        raise Refused("FP8", "needs a GPU with FP8", "use bfloat16, or a GPU such as h100")
    layers = gpu.fp8 if execution.fp8 else gpu.bf16
    experts = done.experts * imbalance(hf.num_experts or 1, mesh.ep, execution)
    in_bf16 = (done.head / LINEAR + done.attention / ATTENTION) / gpu.bf16
    return (done.linear / LINEAR + experts / EXPERTS) / layers + in_bf16


def optimizer_seconds(parameters: float, gpu: GPU) -> float:
    """AdamW over so many parameters of a rank: state read and written, gradients read, parameters written."""
    return parameters * (2 * (MASTER + MOMENTS) + GRADIENT + 2) / (HBM * gpu.hbm)
