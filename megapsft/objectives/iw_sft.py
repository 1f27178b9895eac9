"""Importance-weighted supervised fine-tuning: the likelihood of what the policy prefers more than the reference does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megapsft.errors import Refused
from megapsft.objectives._base import Base
from megapsft.objectives._per_token import PerToken
from megapsft.objectives._ratio import LOG_RATIO_LIMIT, metrics_without_ratio
from megapsft.objectives._samples import at_tokens, sample_means
from megapsft.types import Metric, Microbatch, Over, PolicyOutput

CLIP = {"token": (0.2, 1.8), "sequence": (0.0, 16.0)}  # of the weight: where PSFT's paper, and the released trainer, clip it


@dataclass(frozen=True, kw_only=True)
class IWSFT(PerToken):
    """loss_t = -sg(W_t) l_t, minimised, with W_t = clip(exp(clamp(x_t, -20, 20)), clip_low, clip_high), and

        token     x_t = l_t - l_ref_t                                            [B, S], l_ref is the frozen reference
        sequence  x_t = temperature * mean of l - l_ref over the sample

    Gradient: dloss_t/dl_t = -W_t, clipped or not. Where the policy is the reference this is SFT.

    The paper derives a weight for a whole sequence, and its released trainer uses `sequence` (with a mean, not the product,
    and only for one sample a device; here for any number). PSFT prints and compares with one weight a token, the default.

    Source: Supervised Fine Tuning on Curated Data is Reinforcement Learning (and can be improved) (Qin and Springenberg,
    2025); per token: PSFT (Zhu et al., ICLR 2026), Eq. 13 and Appendix C.4.

    Example:
        three tokens, level = token, clipped to 0.2..1.8

        logprobs     [-0.2,    -1.1,    -0.05]
        ref_logprobs [-0.5,    -0.9,    -2.0]
        weight       [ 1.3499,  0.8187,  1.8]
        ->           [ 0.27,    0.9006,  0.09], their token mean is 0.4202
        gradient     [-1.3499, -0.8187, -1.8], before the weights of 1/3
    """

    needs: ClassVar[frozenset[str]] = frozenset({"ref_logprobs"})
    metrics: ClassVar[Mapping[str, Over]] = Base.metrics | {
        "objective/weight_mean": "mean",
        "objective/weight_max": "max",
        "objective/weight_min": "min",
        "objective/weight_clip_fraction": "mean",
    }
    level: Literal["token", "sequence"] = "token"  # a weight for each token, or for each response from its mean log-ratio
    clip_low: float | None = None  # of the weight; None: 0.2 at level token, 0 at level sequence
    clip_high: float | None = None  # of the weight; None: 1.8 at level token, 16 at level sequence
    temperature: float = 1.0  # sequence only: multiplies the mean log-ratio

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self._clip
        if not 0 <= low <= high:
            raise Refused(
                f"a weight between clip_low={low} and clip_high={high}",
                "is of an empty range, or negative",
                "use 0 <= clip_low <= clip_high, or leave both out",
            )
        if not self.temperature > 0:
            raise Refused(f"temperature={self.temperature}", "must be above 0", "the released trainer uses 1")
        if self.level == "token" and self.temperature != 1:
            raise Refused(f"temperature={self.temperature}", "is not used at level=token", "leave it out, or use level=sequence")

    @property
    def _clip(self) -> tuple[float, float]:
        low, high = CLIP[self.level]
        return (low if self.clip_low is None else self.clip_low, high if self.clip_high is None else self.clip_high)

    def __call__(self, output: PolicyOutput, batch: Microbatch) -> tuple[Tensor, Mapping[str, Metric]]:
        """Losses [B, S] of the dtype of `output.logprobs`, 0 where masked, and the metrics."""
        logprobs = torch.where(batch.loss_mask, output.logprobs, 0)
        log_ratio = logprobs.detach() - torch.where(batch.loss_mask, batch.ref_logprobs.detach(), 0)
        if self.level == "sequence":
            log_ratio = at_tokens(self.temperature * sample_means(log_ratio, batch), batch)
        free = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
        weight = free.clamp(*self._clip)
        return -weight * logprobs, {
            **metrics_without_ratio(logprobs),
            "objective/weight_mean": Metric(weight),
            "objective/weight_max": Metric(weight, "max"),
            "objective/weight_min": Metric(weight, "min"),
            "objective/weight_clip_fraction": Metric((weight != free).to(weight.dtype)),
        }
