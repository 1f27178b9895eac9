"""Floating-point operations that training a model takes on any system: nothing computed twice, no padding."""

from __future__ import annotations

import math
from functools import lru_cache

from megapsft.models.families import layer_rules
from megapsft.models.hf_config import HFConfig

BACKWARD = 2  # times what the forward pass computes


@lru_cache(maxsize=64)
def active_per_token(hf: HFConfig) -> tuple[int, int]:
    """Weights of a layer that a token is multiplied with, over all ranks: outside of experts, and in the experts it goes to."""
    dense, experts = 0, 0
    for rule in layer_rules(hf):
        if len(rule.shape) == 2 and rule.expert:
            experts += math.prod(rule.whole)
        elif len(rule.shape) == 2:
            dense += math.prod(rule.whole)
    return dense, experts * hf.num_experts_per_tok // hf.num_experts if hf.num_experts else 0


def model_flops(hf: HFConfig, tokens: float, squared_lengths: float, *, head: bool = True, frozen: bool = False) -> float:
    """FLOP of forward and backward passes over some samples, a multiplication and an addition counting as two. Of MFU.

        3 (2 N tokens + 2 layers heads head_dim sum of l^2)

    N are the weights that a token is multiplied with: those outside of experts, the router, the experts that it goes to, and the
    output layer; not the embedding. Causal attention: token t of a sample sees t others, l^2 / 2 pairs in all, each of which
    costs 2 FLOP a dimension for its score and 2 for its value. No norm, softmax or rotation is counted.

    Source: PaLM (Chowdhery et al., 2022), appendix B, with the mask counted.

    Args:
        tokens: of all samples, padding left out.
        squared_lengths: sum of l^2 over the samples, l being tokens of one.
        head: False for a model with a scalar head, whose weights are next to nothing.
        frozen: whether weights have no gradient, since adapters are trained, which are left out: 2 (2 N tokens), not 3.

    Example:
        >>> model_flops(qwen3_8b, 4096, 4096**2) / 4096  # a sample of 4096 tokens, by the token
        4.903e10
    """
    dense, experts = active_per_token(hf)
    weights = hf.num_hidden_layers * (dense + experts) + (hf.vocab_size * hf.hidden_size if head else 0)
    attention = 2 * hf.num_hidden_layers * hf.num_attention_heads * hf.head_dim * squared_lengths
    return (BACKWARD if frozen else 1 + BACKWARD) * 2.0 * weights * tokens + (1 + BACKWARD) * attention


__all__ = ["BACKWARD", "active_per_token", "model_flops"]
