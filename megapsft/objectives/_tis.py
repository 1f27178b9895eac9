"""Truncated importance sampling: what the training engine would have sampled, out of what the rollout engine did sample."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megapsft.objectives._samples import at_tokens, sample_sums
from megapsft.types import Metric, Microbatch, Over

LOG_RATIO_LIMIT = 20.0
TIS_METRICS: Mapping[str, Over] = {
    "tis/weight_mean": "mean",
    "tis/weight_max": "max",
    "tis/clip_fraction": "mean",
    "tis/mismatch_kl": "mean",
    "tis/mismatch_k3": "mean",
}


def importance(batch: Microbatch, level: str) -> Tensor:
    """[B, S] exp(clamp(d, -20, 20)) with d = old_logprobs - rollout_logprobs of the token, or their sum over its sample.

    1 where masked at level token; constants.
    """
    difference = mismatch(batch)
    if level == "sequence":
        difference = at_tokens(sample_sums(difference, batch), batch)
    return difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def mismatch(batch: Microbatch) -> Tensor:
    """[B, S] old_logprobs - rollout_logprobs, 0 where masked: 0 everywhere if both engines computed the same."""
    old, rollout = (torch.where(batch.loss_mask, x.detach(), 0) for x in (batch.old_logprobs, batch.rollout_logprobs))
    return old - rollout


def tis_metrics(batch: Microbatch, ratio: Tensor, weight: Tensor, cap: float) -> Mapping[str, Metric]:
    """What the weights are, and how far the engines are apart: KL(rollout || training), its k1 and k3 estimates in nats.

    Args:
        ratio: [B, S], before the cap.
        weight: [B, S], as used.
    """
    difference = mismatch(batch)
    largest = torch.finfo(difference.dtype).max  # exp overflows where the rollout engine took a token for impossible
    return {
        "tis/weight_mean": Metric(weight),
        "tis/weight_max": Metric(weight, "max"),
        "tis/clip_fraction": Metric((ratio > cap).to(weight.dtype)),
        "tis/mismatch_kl": Metric(-difference),
        "tis/mismatch_k3": Metric((torch.expm1(difference) - difference).clamp(max=largest)),
    }
