"""SRFT: supervision and reinforcement in one stage, weighed by the entropy of the policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megapsft.errors import Refused
from megapsft.objectives._mixture import (
    Mixture,
    advantages_of,
    as_mean,
    mean_over,
    part_of_loss,
    shaped,
    split,
)
from megapsft.objectives._per_token import Aggregation
from megapsft.objectives._ratio import metrics_without_ratio
from megapsft.objectives._samples import at_tokens, sample_lengths, sample_means
from megapsft.types import AdvantageOptions, Metric, Microbatch, Over, PolicyOutput

MOST_ENTROPY = 10.0  # nats: exp(H) is held, so that a policy that knows nothing does not make steps of any size
PRESETS = {  # options that are null become these
    "canonical": {"aggregation": "token-mean", "norm_by_std": True, "gamma": 0.0, "entropy_coef": 0.0},
    "hpt": {"aggregation": "sum-over-Lmax", "norm_by_std": False, "gamma": 0.1, "entropy_coef": 0.001},
}


@dataclass(frozen=True, kw_only=True)
class SRFT(Mixture):
    """Four terms, minimised, with p_t = exp(l_t) and the advantage A of a sample in its group, demonstration included:

        demonstrations   the mean of -w_SFT l_t over the demonstration tokens of the update
                         and -A f(p_t),  f(p) = p, or p / (p + gamma)
        rollouts, R > 0  -w_RL l_t
        rollouts, else   l_t

    with w_SFT = sft_coef exp(-H) and w_RL = rl_coef exp(H), constants. H is the policy's own entropy as it is now, at most 10
    nats: the mean over the tokens of the sample, of each token itself, or of all demonstration tokens of the update and of all
    its rollout tokens (`entropy_level`). Less entropy_coef H_t on every token. All but the first term are weighed as
    `aggregation` says.

    Gradients: -w_SFT over the number of demonstration tokens, whatever the aggregation; -A p_t or -A gamma p_t / (p_t + gamma)^2;
    -w_RL; 1. The last term has no bound from below, so keep the learning rate low and the gradient clipped. Rollouts count by the
    sign of their reward, {1, 0} or {1, -1}, not by their advantage: a group that is all correct is trained still.

    Source: SRFT: A Single-Stage Method with Supervised and Reinforcement Fine-Tuning for Reasoning (Fu et al., 2025), Eq. 13;
    rewards of {1, 0} as in its appendix, and the granularity of H, which it leaves open, by sample. `variant=hpt` is the public
    re-implementation (Unify-Post-Training): no deviation in advantages, f shaped with gamma = 0.1, sums over tokens divided by
    the longest response, and an entropy bonus of 0.001.

    Example:
        three tokens, one each of a demonstration, of a correct and of a wrong rollout; entropy_level token

        logprobs     [-0.2,    -0.7,    -1.5]
        entropy      [ 0.1,     0.4,     1.2]
        advantages   [ 0.5,     0.5,    -1.0]
        ->           [-0.1379,  0.1044, -1.5], of it 0.2715 = 3 * 0.0905 the mean over the one demonstration token
        gradient     [-1.7666, -0.1492,  1.0], before the weights of 1/3
    """

    variant: Literal["canonical", "hpt"] = "canonical"  # what the options are that are null
    aggregation: Aggregation | None = None
    entropy_level: Literal["sequence", "token", "batch"] = "sequence"  # over what H is averaged
    sft_coef: float | None = 0.5  # w_SFT = sft_coef exp(-H); null: 1, an ablation
    rl_coef: float | None = 0.1  # w_RL = rl_coef exp(H); null: 1, an ablation
    norm_by_std: bool | None = None  # advantages over the deviation of the group; null: the variant's, true or false
    gamma: float | None = None  # shapes the probability of demonstration tokens; 0: not shaped; null: the variant's, 0 or 0.1
    entropy_coef: float | None = None  # of the entropy bonus; 0: none; null: the variant's, 0 or 0.001
    metrics: ClassVar[Mapping[str, Over]] = Mixture.metrics | {
        "srft/sft_demonstration": "sum",
        "srft/rl_demonstration": "sum",
        "srft/rl_positive": "sum",
        "srft/rl_negative": "sum",
        "srft/entropy": "mean",
        "srft/weight_sft": "mean",
        "srft/weight_rl": "mean",
        "srft/weight_rl_max": "max",
        "srft/off_policy_probability": "mean",
        "srft/on_policy_probability": "mean",
    }

    def __post_init__(self) -> None:
        for key, value in PRESETS.get(self.variant, {}).items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)
        super().__post_init__()
        if not self.gamma >= 0:
            raise Refused(f"gamma={self.gamma}", "must be 0 or more", "use 0.1, or 0 for no shaping")
        for name, coef in (("sft_coef", self.sft_coef), ("rl_coef", self.rl_coef)):
            if coef is not None and not coef >= 0:
                raise Refused(f"{name}={coef}", "must be 0 or more", "the paper has sft_coef=0.5 and rl_coef=0.1")

    @property
    def advantages(self) -> AdvantageOptions:
        return AdvantageOptions(estimator="group", norm_by_std=self.norm_by_std)

    @property
    def totals_need(self) -> frozenset[str]:
        return frozenset({"entropy"} if self.entropy_level == "batch" else ())

    def totals(self, batch: Microbatch) -> Mapping[str, Tensor]:
        demonstrations, rollouts = split(batch)
        counts = {"demonstration": demonstrations.sum(), "rollout": rollouts.sum()}
        if self.entropy_level != "batch":
            return counts
        sums = {key: torch.where(where, batch.entropy.detach(), 0).sum() for key, where in zip(counts, split(batch), strict=True)}
        return counts | {f"{key}_entropy": total for key, total in sums.items()}

    def __call__(self, output: PolicyOutput, batch: Microbatch) -> tuple[Tensor, Mapping[str, Metric]]:
        """Losses [B, S] of the dtype of `output.logprobs`, 0 where masked, and the metrics."""
        demonstrations, rollouts = split(batch)
        positive = rollouts & (batch.rewards > 0)
        logprobs = torch.where(batch.loss_mask, output.logprobs, 0)
        probability, constant = logprobs.exp(), torch.ones_like(logprobs)
        entropy = self._entropy(output.entropy.detach(), batch).clamp(max=MOST_ENTROPY)
        weight_sft = constant if self.sft_coef is None else self.sft_coef * (-entropy).exp()
        weight_rl = constant if self.rl_coef is None else self.rl_coef * entropy.exp()

        sft = as_mean(-weight_sft * logprobs, demonstrations, batch.totals["demonstration"], batch)
        off_policy = -advantages_of(batch, logprobs.dtype) * shaped(probability, self.gamma or None)
        off_policy = torch.where(demonstrations, off_policy, 0)
        good = torch.where(positive, -weight_rl * logprobs, 0)
        bad = torch.where(rollouts & ~positive, logprobs, 0)
        loss = self.with_bonus(sft + off_policy + good + bad, output.entropy, batch.loss_mask)

        per_sample = at_tokens(1 / sample_lengths(batch, logprobs.dtype).clamp(min=1), batch)
        return loss, {
            **metrics_without_ratio(logprobs),
            "srft/sft_demonstration": part_of_loss(sft, batch),
            "srft/rl_demonstration": part_of_loss(off_policy, batch),
            "srft/rl_positive": part_of_loss(good, batch),
            "srft/rl_negative": part_of_loss(bad, batch),
            "srft/entropy": Metric(output.entropy.detach(), "mean", torch.where(batch.loss_mask, per_sample, 0)),
            "srft/weight_sft": mean_over(weight_sft, demonstrations),
            "srft/weight_rl": mean_over(weight_rl, positive),
            "srft/weight_rl_max": Metric(weight_rl, "max", positive.to(weight_rl.dtype)),
            "srft/off_policy_probability": mean_over(probability, demonstrations),
            "srft/on_policy_probability": mean_over(probability, rollouts),
        }

    def _entropy(self, entropy: Tensor, batch: Microbatch) -> Tensor:
        """[B, S] H of each token, 0 where masked."""
        if self.entropy_level == "token":
            return torch.where(batch.loss_mask, entropy, 0)
        if self.entropy_level == "sequence":
            return torch.where(batch.loss_mask, at_tokens(sample_means(entropy, batch), batch), 0)
        means = [batch.totals[f"{key}_entropy"] / max(1.0, batch.totals[key]) for key in ("demonstration", "rollout")]
        demonstrations, rollouts = split(batch)
        return torch.zeros_like(entropy).masked_fill(demonstrations, means[0]).masked_fill(rollouts, means[1])
