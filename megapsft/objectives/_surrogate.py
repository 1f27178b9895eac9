"""What the policy-gradient objectives share: advantages on rollouts, clipped ratios, a KL, and importance sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megapsft.errors import Refused
from megapsft.objectives._base import Base
from megapsft.objectives._kl import k3
from megapsft.objectives._per_token import PerToken
from megapsft.objectives._ratio import clamped_log_ratio, ratio_metrics
from megapsft.objectives._samples import at_tokens, sample_lengths
from megapsft.objectives._tis import TIS_METRICS, importance, tis_metrics
from megapsft.types import AdvantageOptions, Metric, Microbatch, Over, PolicyOutput

TIS_CAP = 2.0  # verl's


@dataclass(frozen=True, kw_only=True)
class Surrogate(Base):
    """loss_t = W_t surrogate_t + kl_coef k3_t, minimised. A subclass says what the surrogate is; its options are

    kl_coef: adds k3_t = min(exp(d) - d - 1, 10) with d = clamp(l_ref_t - l_t, -20, 20), aggregated as the surrogate.

    tis: truncated importance sampling. The rollouts were sampled by another engine, whose log-probabilities are not quite those
    of the training engine at the same weights. With R_t = exp(clamp(l_old_t - l_rollout_t, -20, 20)) (`token`), or the clamped
    sum over the sample (`sequence`), W_t = min(R_t, tis_cap) is a constant that multiplies value and gradient of the surrogate.
    tis_batch_normalize divides W by its mean over the trained tokens of the update. Off: W_t = 1.

    Source of tis: Your Efficient RL Framework Secretly Brings You Off-Policy RL Training (Yao et al., 2025); cap as in verl.
    """

    trains_on: ClassVar[frozenset[str]] = frozenset({"rollouts"})
    clip_low: float | None = 0.2  # the ratio is clipped from below at 1 - clip_low; None: it is not
    clip_high: float | None = 0.2  # and from above at 1 + clip_high; None: it is not
    kl_coef: float = 0.0  # of the k3 estimate of the KL to the reference policy, a part of the loss
    tis: Literal["off", "token", "sequence", False] = "off"  # weights against the mismatch of rollout engine and training
    tis_cap: float = TIS_CAP  # of these weights
    tis_batch_normalize: bool = False  # divide them by their mean over the update

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tis is False:  # how YAML reads a bare off
            object.__setattr__(self, "tis", "off")
        if self.clip_low is not None and not 0 <= self.clip_low <= 1:
            raise Refused(f"clip_low={self.clip_low}", "must lie in 0..1: ratios are positive", "use 0.2, or null")
        if self.clip_high is not None and not self.clip_high >= 0:
            raise Refused(f"clip_high={self.clip_high}", "must be 0 or more", "use 0.2, or null")
        if not self.kl_coef >= 0:
            raise Refused(f"kl_coef={self.kl_coef}", "must be 0 or more", "GRPO's paper uses 0.04; 0 asks for no reference")
        if not self.tis_cap > 0:
            raise Refused(f"tis_cap={self.tis_cap}", "must be above 0", f"the default is {TIS_CAP}")
        if self.tis == "off" and (self.tis_cap != TIS_CAP or self.tis_batch_normalize):
            unused = f"tis_cap={self.tis_cap}" if self.tis_cap != TIS_CAP else "tis_batch_normalize=True"
            raise Refused(unused, "has nothing to act on with tis=off", "use tis=token or tis=sequence, or leave it out")

    def surrogate(
        self, logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, batch: Microbatch
    ) -> tuple[Tensor, Tensor, Mapping[str, Metric]]:
        """(losses [B, S], clipped [B, S] bool, further metrics); all arguments are 0 where masked.

        Args:
            log_ratio: [B, S], of the token, clamped.
        """
        raise NotImplementedError

    @property
    def clip_range(self) -> tuple[float | None, float | None]:
        return self.clip_low, self.clip_high

    @property
    def needs(self) -> frozenset[str]:
        reference = {"ref_logprobs"} if self.kl_coef else set()
        rollout = {"rollout_logprobs"} if self.tis != "off" else set()
        return frozenset({"old_logprobs"} | reference | rollout)

    @property
    def totals_need(self) -> frozenset[str] | None:
        return frozenset({"old_logprobs", "rollout_logprobs"}) if self.tis_batch_normalize else None

    @property
    def metrics(self) -> Mapping[str, Over]:
        own: dict[str, Over] = {f"{group}/{over}": over for group in ("advantages", "reward") for over in ("mean", "max", "min")}
        if self.kl_coef:
            own["objective/kl"] = "mean"
        return super().metrics | own | (TIS_METRICS if self.tis != "off" else {})

    def keep(self, rewards: Sequence[float], demonstrations: Sequence[bool]) -> Sequence[bool]:
        """The rollouts: no policy of ours sampled a demonstration."""
        return [not demonstration for demonstration in demonstrations]

    def totals(self, batch: Microbatch) -> Mapping[str, Tensor]:
        weights = importance(batch, self.tis).clamp(max=self.tis_cap)
        return {"trained": batch.loss_mask.sum(), "weights": torch.where(batch.loss_mask, weights.double(), 0).sum()}

    def __call__(self, output: PolicyOutput, batch: Microbatch) -> tuple[Tensor, Mapping[str, Metric]]:
        """Losses [B, S] of the dtype of `output.logprobs`, 0 where masked, and the metrics.

        `reward` is a mean over samples, the others over tokens.
        """
        logprobs = torch.where(batch.loss_mask, output.logprobs, 0)
        advantages = torch.where(batch.loss_mask, batch.advantages.detach(), 0).to(logprobs.dtype)
        log_ratio = clamped_log_ratio(logprobs, batch.old_logprobs, batch.loss_mask)
        loss, clipped, own = self.surrogate(logprobs, log_ratio, advantages, batch)
        metrics = {**ratio_metrics(logprobs, log_ratio, clipped), **batch_metrics(advantages, batch), **own}
        if self.tis != "off":
            ratio = importance(batch, self.tis)
            weight = ratio.clamp(max=self.tis_cap)
            if self.tis_batch_normalize:
                weight = weight * (batch.totals["trained"] / (batch.totals["weights"] or 1.0))
            loss = loss * weight
            metrics |= tis_metrics(batch, ratio, weight, self.tis_cap)
        if self.kl_coef:
            kl = k3(logprobs, batch.ref_logprobs, batch.loss_mask)
            loss = loss + self.kl_coef * kl
            metrics["objective/kl"] = Metric(kl.detach())
        return torch.where(batch.loss_mask, loss, 0), metrics


@dataclass(frozen=True, kw_only=True)
class GroupRelative(Base):
    """The advantage of a rollout comes from the rewards of all rollouts of its prompt, and is the same for all its tokens."""

    advantage: Literal["group", "rloo"] = "group"  # against the mean of the group, or of its other members
    norm_by_std: bool = True  # and divided by the standard deviation of the group; rloo knows no such thing
    singleton: Literal["raw", "zero"] = "raw"  # the advantage of the only rollout of its prompt: its reward, or none

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.advantage == "rloo" and self.norm_by_std:
            raise Refused("norm_by_std=True", "advantage=rloo has no standard deviation", "set norm_by_std=false")

    @property
    def advantages(self) -> AdvantageOptions:
        return AdvantageOptions(estimator=self.advantage, norm_by_std=self.norm_by_std, singleton=self.singleton)


@dataclass(frozen=True, kw_only=True)
class Clipped(Surrogate, PerToken):
    """surrogate_t = max(-A r_t, -A clip(r_t, 1 - clip_low, 1 + clip_high)), and where A < 0 at most -A dual_clip."""

    dual_clip: float | None = None  # caps the ratio of tokens with a negative advantage, which nothing else does; None: no cap

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise Refused(f"dual_clip={self.dual_clip}", "must be above 1, the ratio at which a step begins", "use 3, or null")

    @property
    def metrics(self) -> Mapping[str, Over]:
        lower: dict[str, Over] = {} if self.dual_clip is None else {"objective/clip_fraction_lower": "mean"}
        return super().metrics | lower

    def surrogate(
        self, logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, batch: Microbatch
    ) -> tuple[Tensor, Tensor, Mapping[str, Metric]]:
        ratio = log_ratio.exp()
        loss, clipped = pessimistic(ratio, advantages, self.clip_low, self.clip_high)
        if self.dual_clip is None:
            return loss, clipped, {}
        capped = (advantages < 0) & (ratio.detach() > self.dual_clip)
        loss = torch.where(capped, -advantages * self.dual_clip, loss)
        return loss, clipped, {"objective/clip_fraction_lower": Metric(capped.to(loss.dtype))}


def pessimistic(ratio: Tensor, advantages: Tensor, clip_low: float | None, clip_high: float | None) -> tuple[Tensor, Tensor]:
    """[B, S] max(-A r, -A clip(r)), and [B, S] bool where that is not -A r: there the gradient is 0."""
    unclipped, bounded = -advantages * ratio, -advantages * clip(ratio, clip_low, clip_high)
    return torch.maximum(unclipped, bounded), bounded > unclipped


def clip(ratio: Tensor, clip_low: float | None, clip_high: float | None) -> Tensor:
    """[B, S] the ratio held between 1 - clip_low and 1 + clip_high; None: no bound."""
    if clip_low is not None:
        ratio = ratio.clamp(min=1 - clip_low)
    return ratio if clip_high is None else ratio.clamp(max=1 + clip_high)


def batch_metrics(advantages: Tensor, batch: Microbatch) -> Mapping[str, Metric]:
    """Advantages of the tokens and rewards of the samples, however long these are."""
    rewards = batch.rewards.detach().to(advantages.dtype)
    return {
        "advantages/mean": Metric(advantages),
        "advantages/max": Metric(advantages, "max"),
        "advantages/min": Metric(advantages, "min"),
        "reward/mean": Metric(rewards, weights=shares(batch)),
        "reward/max": Metric(rewards, "max"),
        "reward/min": Metric(rewards, "min"),
    }


def shares(batch: Microbatch) -> Tensor:
    """[B, S] fp64, 1 / trained tokens of the sample, 0 where masked: with these weights a mean is one over samples."""
    lengths = at_tokens(sample_lengths(batch, torch.float64), batch)
    return torch.where(batch.loss_mask, 1 / lengths.clamp(min=1), 0)
