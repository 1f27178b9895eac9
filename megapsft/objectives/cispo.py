"""Clipped importance sampling policy optimisation: the ratio is clipped as a weight, so that no token loses its gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from megapsft.objectives._per_token import PerToken
from megapsft.objectives._surrogate import GroupRelative, Surrogate, clip
from megapsft.types import Metric, Microbatch


@dataclass(frozen=True, kw_only=True)
class CISPO(Surrogate, GroupRelative, PerToken):
    """loss_t = -sg(clip(r_t, 1 - clip_low, 1 + clip_high)) A l_t, minimised, with l_t the log-probability of token t and

        r_t = exp(clamp(l_t - l_old_t, -20, 20))          [B, S], l_old is the policy at the start of the step
        A   = (R - mean) / (std + 1e-6)                   of the sample, as in GRPO

    Gradient: dloss_t/dl_t = -clip(r_t) A, of every token, whatever its ratio. `objective/clip_fraction` counts the tokens whose
    ratio was clipped.

    Sources disagree on the bounds. The paper has none from below and does not print the upper one. The default cap is TRL's, 5,
    written as clip_high = 4; verl clips from both sides (clip_low = 0.2, clip_high = 0.28).

    Source: MiniMax-M1 (2025), Eq. 4 and 5 (to maximise).

    Example:
        three tokens of one sample with A = 0.5, clip_high = 0.28

        logprobs     [-0.2,    -1.1,    -0.05]
        old_logprobs [-0.35,   -1.0,    -0.6]
        ratio        [ 1.1618,  0.9048,  1.7333]
        ->           [ 0.1162,  0.4977,  0.032], their mean is 0.2153
        gradient     [-0.5809, -0.4524, -0.64], before the weights of 1/3
    """

    clip_low: float | None = None  # the ratio is clipped from below at 1 - clip_low; None: it is not
    clip_high: float | None = 4.0  # and from above at 1 + clip_high; None: it is not

    def surrogate(
        self, logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, batch: Microbatch
    ) -> tuple[Tensor, Tensor, Mapping[str, Metric]]:
        ratio = log_ratio.detach().exp()
        weight = clip(ratio, self.clip_low, self.clip_high)
        return -weight * advantages * logprobs, weight != ratio, {}
