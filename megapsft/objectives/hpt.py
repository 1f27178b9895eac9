"""Hybrid post-training: a prompt that the policy cannot solve is learnt from its demonstration, any other from its rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megapsft.errors import Refused
from megapsft.objectives._mixture import (
    Mixture,
    advantages_of,
    as_mean,
    mean_over,
    part_of_loss,
    split,
)
from megapsft.objectives._per_token import Aggregation
from megapsft.objectives._ratio import clamped_log_ratio, ratio_metrics
from megapsft.objectives._surrogate import pessimistic
from megapsft.types import AdvantageOptions, Metric, Microbatch, Over, PolicyOutput

CORRECT = 1.0  # the reward of a correct rollout, at least


@dataclass(frozen=True, kw_only=True)
class HPT(Mixture):
    """For each prompt, where at most `gate` rollouts have a reward of 1 or more its demonstrations alone are trained, else its
    rollouts alone; a prompt without a demonstration keeps its rollouts. Without a gate both are trained. Minimised:

        rollouts         loss_t = max(-A r_t, -A clip(r_t, 1 - clip, 1 + clip)),  r_t = exp(clamp(l_t - l_old_t, -20, 20))
        demonstrations   sft_coef times the mean of -l_t over the demonstration tokens of the update

    less entropy_coef H_t on every token. A is the advantage among the rollouts of the prompt, without the demonstration.
    Gradients: -A r_t where it is not clipped; -sft_coef over the number of demonstration tokens, whatever the aggregation of the
    rollouts is.

    Source: Towards a Unified View of Large Language Model Post-Training (Lv et al., 2025): gate 0, and sft_coef 1, or 0.3
    for the model of 1.5B. As in its code advantages are not divided by their deviation, and rollouts are summed over
    tokens and divided by the longest response. Without a gate it is L_SFT + L_RL, the baseline "SFT+RL" of SRFT (Fu et al.,
    2025), there with GRPO's advantages: norm_by_std=true, aggregation=token-mean.

    Example:
        three tokens, the first of a demonstration, the others of a rollout; clip = 0.2, aggregation token-mean

        logprobs     [-0.7,    -1.1,    -0.2]
        old_logprobs [  any,   -1.0,    -0.6]
        advantages   [ 0.0,     0.5,     0.5]
        ->           [ 2.1,    -0.4524, -0.6]
        gradient     [-3.0,    -0.4524,  0], before the weights of 1/3: one demonstration token is its own mean
    """

    aggregation: Aggregation = "sum-over-Lmax"
    gate: int | None = 0  # correct rollouts of a prompt up to which its demonstration is trained instead; null: always both
    sft_coef: float = 1.0  # of the demonstrations' term
    clip: float | None = 0.2  # of the rollouts' ratio, on both sides; null: not clipped
    norm_by_std: bool = False  # advantages over the deviation of the group
    needs: ClassVar[frozenset[str]] = frozenset({"old_logprobs"})
    totals_need: ClassVar[frozenset[str]] = frozenset()
    metrics: ClassVar[Mapping[str, Over]] = Mixture.metrics | {
        "hpt/sft": "sum",
        "hpt/rl": "sum",
        "hpt/demonstration_tokens": "mean",
        "hpt/on_clip_fraction": "mean",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate is not None and self.gate < 0:
            remedy = "0 trains the demonstration where no rollout is correct, null trains both"
            raise Refused(f"gate={self.gate}", "must be 0 or more", remedy)
        if not self.sft_coef > 0:
            raise Refused(f"sft_coef={self.sft_coef}", "must be above 0", "use 1.0, or another objective for rollouts alone")
        if self.clip is not None and not 0 <= self.clip < 1:
            raise Refused(f"clip={self.clip}", "must lie in 0..1: ratios are positive", "use 0.2, or null")

    @property
    def clip_range(self) -> tuple[float | None, float | None]:
        return self.clip, self.clip

    @property
    def advantages(self) -> AdvantageOptions:
        return AdvantageOptions(estimator="group", norm_by_std=self.norm_by_std, demonstrations=False)

    def keep(self, rewards: Sequence[float], demonstrations: Sequence[bool]) -> Sequence[bool]:
        """The demonstrations of a group or its rollouts, or all of it."""
        if self.gate is None:
            return [True] * len(rewards)
        correct = sum(reward >= CORRECT for reward, other in zip(rewards, demonstrations, strict=True) if not other)
        imitate = any(demonstrations) and correct <= self.gate
        return [flag == imitate for flag in demonstrations]

    def totals(self, batch: Microbatch) -> Mapping[str, Tensor]:
        return {"demonstration": split(batch)[0].sum()}

    def __call__(self, output: PolicyOutput, batch: Microbatch) -> tuple[Tensor, Mapping[str, Metric]]:
        """Losses [B, S] of the dtype of `output.logprobs`, 0 where masked, and the metrics."""
        demonstrations, rollouts = split(batch)
        logprobs = torch.where(batch.loss_mask, output.logprobs, 0)
        log_ratio = clamped_log_ratio(logprobs, batch.old_logprobs, rollouts)
        surrogate, clipped = pessimistic(log_ratio.exp(), advantages_of(batch, logprobs.dtype), self.clip, self.clip)
        rl, clipped = torch.where(rollouts, surrogate, 0), clipped & rollouts
        sft = as_mean(-self.sft_coef * logprobs, demonstrations, batch.totals["demonstration"], batch)
        return self.with_bonus(sft + rl, output.entropy, batch.loss_mask), {
            **ratio_metrics(logprobs, log_ratio, clipped),
            "hpt/sft": part_of_loss(sft, batch),
            "hpt/rl": part_of_loss(rl, batch),
            "hpt/demonstration_tokens": Metric(demonstrations.to(sft.dtype)),
            "hpt/on_clip_fraction": mean_over(clipped.to(sft.dtype), rollouts),
        }
