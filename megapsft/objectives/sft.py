"""Supervised fine-tuning: the negative log-likelihood of the demonstration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megapsft.objectives._per_token import PerToken
from megapsft.objectives._ratio import metrics_without_ratio
from megapsft.types import Metric, Microbatch, PolicyOutput


@dataclass(frozen=True, kw_only=True)
class SFT(PerToken):
    """loss_t = -l_t, minimised, with l_t the log-probability of demonstration token t. Gradient: dloss_t/dl_t = -1.

    There is no old policy. Seen as PSFT the ratio is 1 by definition, and so it is reported, so that every objective has
    the same keys.

    Source: PSFT (Zhu et al., ICLR 2026), Eq. 2; the baseline of every other objective.

    Example:
        three tokens, the last of them not trained (aggregation token-mean)

        logprobs  [-0.2, -1.1, -0.5]
        loss_mask [True, True, False]
        ->        [ 0.2,  1.1,  0.0], their token mean is 0.65
    """

    def __call__(self, output: PolicyOutput, batch: Microbatch) -> tuple[Tensor, Mapping[str, Metric]]:
        """Losses [B, S] of the dtype of `output.logprobs`, 0 where masked, and the metrics."""
        logprobs = torch.where(batch.loss_mask, output.logprobs, 0)
        return -logprobs, metrics_without_ratio(logprobs)
