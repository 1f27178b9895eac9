"""What the forward pass of a layer keeps for the backward pass, by token, under Transformer Engine with fused attention.

Counted as in Reducing Activation Recomputation in Large Transformer Models (Korthikanti et al., 2023), section 4, for layers with
RMSNorm, grouped queries, gated MLPs and experts, without dropout: every tensor that a backward pass reads is counted once.
"""

from __future__ import annotations

from dataclasses import dataclass

from megapsft.config import ParallelConfig
from megapsft.models.families import family_of
from megapsft.models.hf_config import HFConfig
from megapsft.parallel import Mesh


@dataclass(frozen=True, kw_only=True)
class LayerBytes:
    """For one position of a rank's microbatch (after context parallelism)."""

    kept: float  # between the passes
    whole: float  # while its own backward pass runs: what was recomputed is there too
    mlp: float  # of `whole`, what belongs to the MLP or the experts


def layer_bytes(hf: HFConfig, mesh: Mesh, parallel: ParallelConfig, itemsize: int, spread: float) -> LayerBytes:
    """Of one decoder layer.

    Args:
        itemsize: bytes of an activation.
        spread: tokens of the rank that experts load most, over the mean.
    """
    attention, outside = _attention(hf, mesh, itemsize)
    norms = 2 * outside  # what both norms give
    mlp = _experts(hf, mesh, itemsize, spread) if hf.num_experts else 3 * hf.intermediate_size * itemsize / mesh.tp
    whole = 2 * outside + norms + attention + mlp
    recomputed = {"core_attn": 4 * hf.num_attention_heads / mesh.tp, "mlp": mlp, "moe": mlp, "layernorm": norms}
    kept = whole
    if parallel.recompute_granularity == "full":
        kept = outside
    elif parallel.recompute_granularity == "selective":
        names = set(parallel.recompute_modules) - {"moe" if not hf.num_experts else "mlp"}
        kept = whole - sum(recomputed[name] for name in names)
    return LayerBytes(kept=kept, whole=whole, mlp=mlp)


def _attention(hf: HFConfig, mesh: Mesh, itemsize: int) -> tuple[float, float]:
    """Bytes of attention between its norm and the residual, and of a hidden state."""
    queries, keys = hf.num_attention_heads * hf.head_dim, hf.num_key_value_heads * hf.head_dim
    split = queries + 2 * keys + queries  # query, key, value; the output, which the projection reads
    if family_of(hf).qk_layernorm:
        split += queries + keys  # before their norms
    softmax = 4 * hf.num_attention_heads  # its log-sum-exp, fp32
    hidden = hf.hidden_size * itemsize / (mesh.tp if mesh.sequence_parallel else 1)
    return (split * itemsize + softmax) / mesh.tp, hidden


def _experts(hf: HFConfig, mesh: Mesh, itemsize: int, spread: float) -> float:
    """Tokens as they arrive at their experts, gate and up, what the down projection reads; scores and probabilities in fp32."""
    dispatched = hf.num_experts_per_tok * mesh.etp / mesh.tp * spread
    return dispatched * (hf.hidden_size + 3 * hf.moe_intermediate_size / mesh.etp) * itemsize + 8 * hf.num_experts / mesh.tp


def chunks_in_flight(mesh: Mesh, stage: int, microbatches: int) -> int:
    """Microbatches, each through one model chunk of the stage, whose activations are kept at once: Megatron's 1F1B schedules."""
    if mesh.vpp == 1:
        return min(microbatches, mesh.pp - stage)
    warmup = 2 * (mesh.pp - stage - 1) + (mesh.vpp - 1) * mesh.pp
    return min(microbatches * mesh.vpp, warmup + 1)
