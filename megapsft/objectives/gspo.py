"""Group sequence policy optimisation: one ratio a sample, and one clip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megapsft.objectives._samples import at_tokens, sample_means
from megapsft.objectives._surrogate import GroupRelative, Surrogate, pessimistic, shares
from megapsft.types import Metric, Microbatch, Over

LOG_RATIO_LIMITS = (-20.0, 10.0)  # the upper one is verl's; beyond them the gradient is 0


@dataclass(frozen=True, kw_only=True)
class GSPO(Surrogate, GroupRelative):
    """loss_t = max(-A s_t, -A clip(s_t, 1 - clip_low, 1 + clip_high)), minimised, with the same value for all tokens of a sample,

        s   = exp(clamp(mean of l_t - l_old_t over the sample, -20, 10))       the ratio of the sample
        s_t = sg(s) exp(l_t - sg(l_t))                                         its value, with the gradient of the token
        A   = (R - mean) / (std + 1e-6)                                        of the sample, as in GRPO

    so that L = mean over samples of max(-A s, -A clip(s)): the aggregation is seq-mean-token-mean, and no other.

    Gradient: dloss_t/dl_t = -A s, and 0 on the whole sample where A > 0 and s > 1 + clip_high, where A < 0 and
    s < 1 - clip_low, and beyond the limits of the mean. The bounds are a hundredth of GRPO's, as s is a mean, and still clip a
    tenth to a half of the samples.

    The metrics of the ratio are those of the tokens, as for every objective; those of s have names of their own.

    Source: Group Sequence Policy Optimization (Zheng et al., 2025), Eq. 5 and 7; bounds: section 5.1; token form: Eq. 14.

    Example:
        three tokens of one sample with A = 0.5, clip_low = 0.2 and clip_high = 0.28

        logprobs     [-0.2,    -1.1,    -0.05]
        old_logprobs [-0.35,   -1.0,    -0.6]      mean difference 0.2, s = 1.2214
        ->           [-0.6107, -0.6107, -0.6107]
        gradient     [-0.6107, -0.6107, -0.6107], before the weights of 1/3; all 0 at the default bounds
    """

    aggregation: ClassVar[str] = "seq-mean-token-mean"
    max_response_length: ClassVar[int | None] = None
    clip_low: float | None = 3e-4  # the ratio of a sample is clipped from below at 1 - clip_low; None: it is not
    clip_high: float | None = 4e-4  # and from above at 1 + clip_high; None: it is not

    @property
    def metrics(self) -> Mapping[str, Over]:
        ratio: dict[str, Over] = {f"objective/sequence_ratio_{over}": over for over in ("mean", "max", "min")}
        return super().metrics | ratio

    def surrogate(
        self, logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, batch: Microbatch
    ) -> tuple[Tensor, Tensor, Mapping[str, Metric]]:
        constant = logprobs.detach()
        difference = constant - torch.where(batch.loss_mask, batch.old_logprobs.detach(), 0)
        of_sample = at_tokens(sample_means(difference, batch), batch)
        ratio = (of_sample + (logprobs - constant)).clamp(*LOG_RATIO_LIMITS).exp()
        loss, clipped = pessimistic(ratio, advantages, self.clip_low, self.clip_high)
        value = ratio.detach()
        return loss, clipped, {
            "objective/sequence_ratio_mean": Metric(value, weights=shares(batch)),
            "objective/sequence_ratio_max": Metric(value, "max"),
            "objective/sequence_ratio_min": Metric(value, "min"),
        }
