"""Proximal supervised fine-tuning: the clipped surrogate of PPO on demonstrations, with a constant advantage of 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megapsft.errors import Refused
from megapsft.objectives._per_token import PerToken
from megapsft.types import Metric, Microbatch, PolicyOutput

LOG_RATIO_LIMIT = 20.0  # exp stays far inside fp32; beyond it the gradient is 0


@dataclass(frozen=True, kw_only=True)
class PSFT(PerToken):
    """loss_t = -min(A_t r_t, A_t clip(r_t, 1 - clip_low, 1 + clip_high)), minimised, with

        r_t = exp(clamp(l_t - l_old_t, -20, 20))        [B, S], l_old is the policy at the start of the step
        A_t = 1, or 1[H_old_t > entropy_threshold]      [B, S], strict

    Gradient: dloss_t/dl_t = -A_t r_t where r_t <= 1 + clip_high and |l_t - l_old_t| <= 20, else 0. The clip is one-sided: a
    token whose probability has risen enough since the start of the step is let go, one whose probability fell keeps its
    gradient, so `clip_low` never binds while A_t >= 0. On the first update of a step r_t = 1, and the gradient is SFT's.

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

    clip_low: float = 0.2
    clip_high: float | None = 0.28  # None: no clip, an ablation
    entropy_threshold: float | None = None  # nats; trains only tokens where the old policy was less sure than this
    entropy_denominator: Literal["all", "selected"] = "all"  # token-mean over trained tokens, or those over the threshold

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.clip_low <= 1:
            raise Refused(f"clip_low={self.clip_low}", "must lie in 0..1: ratios are positive", "the paper's scripts use 0.2")
        if self.clip_high is not None and not self.clip_high >= 0:
            raise Refused(f"clip_high={self.clip_high}", "must be 0 or more", "the paper uses 0.28; null turns clipping off")
        if self.entropy_denominator not in ("all", "selected"):
            raise Refused(f"entropy_denominator={self.entropy_denominator!r}", "is not known", "use all or selected")
        if self.entropy_denominator == "selected" and self.entropy_threshold is None:
            raise Refused("entropy_denominator='selected'", "selects nothing without entropy_threshold", "set entropy_threshold")
        if self.entropy_denominator == "selected" and self.aggregation != "token-mean":
            raise Refused(
                "entropy_denominator='selected'",
                f"is a token mean, but aggregation={self.aggregation!r}",
                "use aggregation=token-mean, or entropy_denominator=all",
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"old_logprobs"} if self.entropy_threshold is None else {"old_logprobs", "old_entropy"})

    @property
    def selects(self) -> bool:
        return self.entropy_denominator == "selected"

    def select(self, batch: Microbatch) -> Tensor | None:
        return self._advantage(batch) if self.selects else None

    def __call__(self, output: PolicyOutput, batch: Microbatch) -> tuple[Tensor, Mapping[str, Metric]]:
        """Losses [B, S] of the dtype of `output.logprobs`, 0 where masked, and the metrics.

        A token counts as clipped where clipping made its loss strictly larger.
        """
        logprobs = torch.where(batch.loss_mask, output.logprobs, 0)
        old_logprobs = torch.where(batch.loss_mask, batch.old_logprobs, 0)
        log_ratio = (logprobs - old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        ratio = log_ratio.exp()
        advantage = self._advantage(batch).to(ratio.dtype)

        unclipped = clipped = -advantage * ratio
        if self.clip_high is not None:
            clipped = -advantage * ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        loss = torch.maximum(unclipped, clipped)

        return loss, {
            "objective/nll": Metric(-logprobs.detach()),
            "objective/clip_fraction": Metric((clipped > unclipped).to(ratio.dtype)),
            "objective/ratio_mean": Metric(ratio.detach()),
            "objective/ratio_max": Metric(ratio.detach(), "max"),
            "objective/ratio_min": Metric(ratio.detach(), "min"),
            "objective/ppo_kl": Metric(-log_ratio.detach()),
        }

    def _advantage(self, batch: Microbatch) -> Tensor:
        """[B, S] bool, False where masked."""
        if self.entropy_threshold is None:
            return batch.loss_mask
        return batch.loss_mask & (batch.old_entropy > self.entropy_threshold)
