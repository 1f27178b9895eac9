"""The ratio of the policy to an older self, and the metrics that every objective reports of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megapsft.types import Metric

LOG_RATIO_LIMIT = 20.0  # exp stays far inside fp32; beyond it the gradient is 0


def clamped_log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """[B, S] clamp(logprobs - old_logprobs, -20, 20), 0 where masked, whatever lies there.

    The gradient is that of `logprobs`, and 0 beyond the limits; `old_logprobs` are constants.
    """
    difference = torch.where(mask, logprobs, 0) - torch.where(mask, old_logprobs.detach(), 0)
    return difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def ratio_metrics(logprobs: Tensor, log_ratio: Tensor, clipped: Tensor) -> Mapping[str, Metric]:
    """The metrics that every objective has.

    Args:
        logprobs: [B, S], 0 where masked.
        log_ratio: [B, S], clamped.
        clipped: [B, S] bool: where clipping made the loss strictly larger.
    """
    log_ratio = log_ratio.detach()
    ratio = log_ratio.exp()
    return {
        "objective/nll": Metric(-logprobs.detach()),
        "objective/clip_fraction": Metric(clipped.to(ratio.dtype)),
        "objective/ratio_mean": Metric(ratio),
        "objective/ratio_max": Metric(ratio, "max"),
        "objective/ratio_min": Metric(ratio, "min"),
        "objective/log_ratio_p01": Metric(log_ratio, "p01"),
        "objective/log_ratio_p50": Metric(log_ratio, "p50"),
        "objective/log_ratio_p99": Metric(log_ratio, "p99"),
        "objective/ppo_kl": Metric(-log_ratio),
    }


def metrics_without_ratio(logprobs: Tensor) -> Mapping[str, Metric]:
    """The same where there is no old policy: the ratio is 1 by definition, and nothing is clipped."""
    zero = torch.zeros_like(logprobs)
    return ratio_metrics(logprobs, zero, zero.bool())
