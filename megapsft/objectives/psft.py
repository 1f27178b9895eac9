"""Proximal supervised fine-tuning: the clipped surrogate of PPO on demonstrations, with a constant advantage of 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megapsft.errors import Refused
from megapsft.objectives._per_token import PerToken
from megapsft.objectives._ratio import clamped_log_ratio, ratio_metrics
from megapsft.types import Metric, Microbatch, PolicyOutput


@dataclass(frozen=True, kw_only=True)
class PSFT(PerToken):
    """loss_t = -min(A_t r_t, A_t clip(r_t, 0, 1 + clip_high)), minimised, with

        r_t = exp(clamp(l_t - l_old_t, -20, 20))        [B, S], l_old is the policy at the start of the step
        A_t = 1, or 1[H_old_t > entropy_threshold]      [B, S], strict

    Gradient: dloss_t/dl_t = -A_t r_t where r_t <= 1 + clip_high and |l_t - l_old_t| <= 20, else 0. The clip is one-sided: a
    token whose probability has risen enough since the start of the step is let go, one whose probability fell keeps its
    gradient. (The lower clip of the paper's scripts, 0.2, never binds while A_t >= 0, and so there is no such option;
    `freeze_below` is what a clip from both sides would have to be.) On the first update of a step r_t = 1, and the gradient
    is SFT's.

    Source: Proximal Supervised Fine-Tuning (Zhu et al., ICLR 2026), Eq. 6 and 7 (printed as a quantity to maximise);
    entropy as advantage: Appendix C.2.

    Example:
        three tokens, clip_high = 0.28

        logprobs     [-0.2,    -1.1,    -0.05]
        old_logprobs [-0.35,   -1.0,    -0.6]
        ratio        [ 1.1618,  0.9048,  1.7333]
        ->           [-1.1618, -0.9048, -1.28], their token mean is -1.1156
        gradient     [-1.1618, -0.9048,  0], before the weights of 1/3
    """

    clip_high: float | None = 0.28  # None: no clip, an ablation
    freeze_below: float | None = None  # also let go of tokens with r_t < 1 - freeze_below, an ablation: clipped from both sides
    old_policy: Literal["step", "reference"] = "step"  # refreshed every step, or never: the frozen reference, an ablation
    entropy_threshold: float | None = None  # nats; trains only tokens where the old policy was less sure than this
    entropy_denominator: Literal["all", "selected"] = "all"  # token-mean over trained tokens, or those over the threshold

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip_high is not None and not self.clip_high >= 0:
            raise Refused(f"clip_high={self.clip_high}", "must be 0 or more", "the paper uses 0.28; null turns clipping off")
        if self.freeze_below is not None and not 0 <= self.freeze_below < 1:
            raise Refused(f"freeze_below={self.freeze_below}", "must lie in 0..1: ratios are positive", "use 0.2, or null")
        if self.entropy_denominator == "selected" and self.entropy_threshold is None:
            raise Refused("entropy_denominator='selected'", "selects nothing without entropy_threshold", "set entropy_threshold")
        if self.entropy_denominator == "selected" and self.aggregation != "token-mean":
            raise Refused(
                "entropy_denominator='selected'",
                f"is a token mean, but aggregation={self.aggregation!r}",
                "use aggregation=token-mean, or entropy_denominator=all",
            )

    @property
    def clip_range(self) -> tuple[float | None, float | None]:
        return self.freeze_below, self.clip_high

    @property
    def needs(self) -> frozenset[str]:
        anchor = {"old_logprobs"} if self.old_policy == "step" else {"ref_logprobs"}
        return frozenset(anchor if self.entropy_threshold is None else anchor | {"old_entropy"})

    @property
    def totals_need(self) -> frozenset[str] | None:
        return frozenset({"old_entropy"}) if self.entropy_denominator == "selected" else None

    def totals(self, batch: Microbatch) -> Mapping[str, Tensor]:
        return {"trained": batch.loss_mask.sum(), "selected": self._advantage(batch).sum()}

    def __call__(self, output: PolicyOutput, batch: Microbatch) -> tuple[Tensor, Mapping[str, Metric]]:
        """Losses [B, S] of the dtype of `output.logprobs`, 0 where masked, and the metrics.

        A token counts as clipped where clipping made its loss strictly larger, or froze it from below.
        """
        logprobs = torch.where(batch.loss_mask, output.logprobs, 0)
        old_logprobs = batch.old_logprobs if self.old_policy == "step" else batch.ref_logprobs
        log_ratio = clamped_log_ratio(logprobs, old_logprobs, batch.loss_mask)
        ratio = log_ratio.exp()
        advantage = self._advantage(batch).to(ratio.dtype)

        unclipped = clipped = -advantage * ratio
        if self.clip_high is not None:
            clipped = -advantage * ratio.clamp(max=1 + self.clip_high)
        loss = torch.maximum(unclipped, clipped)
        frozen = clipped > unclipped
        if self.freeze_below is not None:
            low = 1 - self.freeze_below
            loss = torch.where(ratio < low, -advantage * low, loss)
            frozen = frozen | ((ratio < low) & (advantage > 0))
        if self.totals_need:
            loss = loss * (batch.totals["trained"] / max(1.0, batch.totals["selected"]))
        return loss, ratio_metrics(logprobs, log_ratio, frozen)

    def _advantage(self, batch: Microbatch) -> Tensor:
        """[B, S] bool, False where masked."""
        if self.entropy_threshold is None:
            return batch.loss_mask
        return batch.loss_mask & (batch.old_entropy > self.entropy_threshold)
