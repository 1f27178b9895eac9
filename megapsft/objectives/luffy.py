"""LUFFY: policy optimisation over rollouts and a demonstration, which counts as a rollout of another policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megapsft.errors import Refused
from megapsft.objectives._mixture import (
    Mixture,
    advantages_of,
    mean_over,
    shaped,
    split,
)
from megapsft.objectives._per_token import Aggregation
from megapsft.objectives._ratio import clamped_log_ratio, ratio_metrics
from megapsft.objectives._surrogate import pessimistic
from megapsft.types import AdvantageOptions, Metric, Microbatch, Over, PolicyOutput


@dataclass(frozen=True, kw_only=True)
class LUFFY(Mixture):
    """Minimised, with the advantage A of a sample in its group, demonstration included:

        rollouts         loss_t = -A r_t,  r_t = exp(clamp(l_t - l_old_t, -20, 20))
                         or max(-A r_t, -A clip(r_t, 1 - on_policy_clip, 1 + on_policy_clip))
        demonstrations   loss_t = -A f(p_t),  f(p) = p / (p + gamma),  p_t = exp(l_t)

    less entropy_coef H_t on every token. Gradients: -A r_t where it is not clipped; -A gamma p_t / (p_t + gamma)^2, which is
    largest at p_t = gamma, so that rare tokens of the demonstration are learnt.

    A demonstration has no old policy: pi_beta = 1, so that its ratio is p_t itself, and the metrics of the ratio see 1 there.

    Source: Learning to Reason under Off-Policy Guidance (Yan et al., 2025): mixed-policy GRPO with policy shaping. The paper
    clips the rollouts' ratio and divides advantages by their deviation; the released script does neither, divides the sum over
    tokens by the longest response (8192) and has an entropy bonus of 0.001. The defaults are the script's; the clamp of the
    log-ratio is ours.

    Example:
        three tokens, the first two of a demonstration, the third of a rollout; no entropy bonus

        logprobs     [-0.2,    -2.3,    -0.6]
        old_logprobs [  any,     any,   -0.9]
        advantages   [ 0.5,     0.5,    -0.5]
        ->           [-0.4456, -0.2503,  0.6749]
        gradient     [-0.0485, -0.1250,  0.6749], before the weights of 1/8192
    """

    aggregation: Aggregation = "sum-over-Lmax"
    gamma: float | None = 0.1  # shapes the probability of demonstration tokens, p / (p + gamma); null: p, not shaped
    on_policy_clip: float | None = None  # of the rollouts' ratio, on both sides; the paper has 0.2; null: not clipped
    norm_by_std: bool = False  # advantages over the deviation of the group; the paper has it
    entropy_coef: float = 0.001  # of the entropy bonus; 0: none
    needs: ClassVar[frozenset[str]] = frozenset({"old_logprobs"})
    metrics: ClassVar[Mapping[str, Over]] = Mixture.metrics | {
        "luffy/off_ratio_mean": "mean",
        "luffy/off_policy_probability": "mean",
        "luffy/on_policy_probability": "mean",
        "luffy/on_clip_fraction": "mean",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma is not None and not self.gamma > 0:
            raise Refused(f"gamma={self.gamma}", "must be above 0: p / (p + 0) has no gradient", "use 0.1; null is no shaping")
        if self.on_policy_clip is not None and not 0 <= self.on_policy_clip < 1:
            raise Refused(f"on_policy_clip={self.on_policy_clip}", "must lie in 0..1: ratios are positive", "use 0.2, or null")

    @property
    def clip_range(self) -> tuple[float | None, float | None]:
        return self.on_policy_clip, self.on_policy_clip

    @property
    def advantages(self) -> AdvantageOptions:
        return AdvantageOptions(estimator="group", norm_by_std=self.norm_by_std)

    def __call__(self, output: PolicyOutput, batch: Microbatch) -> tuple[Tensor, Mapping[str, Metric]]:
        """Losses [B, S] of the dtype of `output.logprobs`, 0 where masked, and the metrics."""
        demonstrations, rollouts = split(batch)
        logprobs = torch.where(batch.loss_mask, output.logprobs, 0)
        advantages = advantages_of(batch, logprobs.dtype)
        log_ratio = clamped_log_ratio(logprobs, batch.old_logprobs, rollouts)
        on_policy, clipped = pessimistic(log_ratio.exp(), advantages, self.on_policy_clip, self.on_policy_clip)
        off_ratio = shaped(logprobs.exp(), self.gamma)
        loss = torch.where(demonstrations, -advantages * off_ratio, on_policy)
        clipped = clipped & rollouts
        return self.with_bonus(loss, output.entropy, batch.loss_mask), {
            **ratio_metrics(logprobs, log_ratio, clipped),
            "luffy/off_ratio_mean": mean_over(off_ratio, demonstrations),
            "luffy/off_policy_probability": mean_over(logprobs.exp(), demonstrations),
            "luffy/on_policy_probability": mean_over(torch.where(rollouts, batch.old_logprobs, 0).exp(), rollouts),
            "luffy/on_clip_fraction": mean_over(clipped.to(loss.dtype), rollouts),
        }
