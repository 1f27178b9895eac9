"""Proximal policy optimisation with a value function: clipped surrogate, generalised advantages, clipped value loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megapsft.errors import Refused
from megapsft.objectives._surrogate import Clipped
from megapsft.types import AdvantageOptions, Metric, Microbatch, Over


@dataclass(frozen=True, kw_only=True)
class PPO(Clipped):
    """loss_t = max(-A_t r_t, -A_t clip(r_t, 1 - clip_low, 1 + clip_high)) + kl_coef k3_t, minimised, with

        r_t = exp(clamp(l_t - l_old_t, -20, 20))          [B, S], l_old is the policy at the start of the step
        A_t = generalised advantages (gamma, lam) of the values at the start of the step, whitened over the step

    The reward stands on the last trained token of a sample; with reward_kl_coef every token is charged
    reward_kl_coef (l_old_t - l_ref_t) beside it, before the advantages are estimated. kl_coef is a KL in the loss instead.

    Gradient: dloss_t/dl_t = -A_t r_t, and 0 where A_t > 0 and r_t > 1 + clip_high, where A_t < 0 and r_t < 1 - clip_low, and
    where |l_t - l_old_t| > 20; dual_clip as in GRPO, off by default though verl has 3. The value function is trained beside it,
    by `value_loss`.

    Source: Proximal Policy Optimization Algorithms (Schulman et al., 2017), Eq. 7 (to maximise); advantages: Schulman et al.
    (ICLR 2016), Eq. 16; KL in the reward: InstructGPT (Ouyang et al., 2022), Eq. 2. gamma, lam and value_clip are verl's.

    Example:
        three tokens with advantages of their own

        advantages   [ 0.5,    -0.5,     1.0]
        logprobs     [-0.2,    -1.1,    -0.05]
        old_logprobs [-0.35,   -1.0,    -0.6]
        ratio        [ 1.1618,  0.9048,  1.7333]
        ->           [-0.5809,  0.4524, -1.2], their mean is -0.4428
        gradient     [-0.5809,  0.4524,  0], before the weights of 1/3
    """

    critic: ClassVar[bool] = True
    value_metrics: ClassVar[Mapping[str, Over]] = {  # every key that `value_loss` reports, and how it is reduced
        "critic/clip_fraction": "mean",
        "critic/return_mean": "mean",
        "critic/return_square": "mean",
        "critic/error_mean": "mean",
        "critic/error_square": "mean",
    }
    gamma: float = 1.0  # discount of what comes later
    lam: float = 1.0  # 1: advantages are returns less values; 0: one step ahead, the rest is left to the value function
    whiten: bool = True  # advantages to mean 0 and variance 1 over the step
    reward_kl_coef: float = 0.0  # a KL to the reference policy as a part of the reward
    value_clip: float | None = 0.5  # values move this far in a step before the loss holds them; None: they are free

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise Refused(f"{name}={getattr(self, name)}", "must lie in 0..1", "1 is usual where outcomes are rewarded")
        if not self.reward_kl_coef >= 0:
            raise Refused(f"reward_kl_coef={self.reward_kl_coef}", "must be 0 or more", "0 asks for no reference")
        if self.value_clip is not None and not self.value_clip > 0:
            raise Refused(f"value_clip={self.value_clip}", "must be above 0", "use 0.5; null turns clipping off")

    @property
    def advantages(self) -> AdvantageOptions:
        return AdvantageOptions(
            estimator="gae", gamma=self.gamma, lam=self.lam, whiten=self.whiten, kl_coef=self.reward_kl_coef
        )

    def value_loss(self, values: Tensor, batch: Microbatch) -> tuple[Tensor, Mapping[str, Metric]]:
        """The critic's losses [B, S] of the dtype of `values`, 0 where masked, and the metrics `value_metrics`:

            loss_t = 0.5 max((v_t - G_t)^2, (clip(v_t, V_t - value_clip, V_t + value_clip) - G_t)^2)

        with v the values now, V those at the start of the step, `batch.values`, and G `batch.returns`. It is summed with the
        same loss weights as the policy's. Gradient: v_t - G_t, and 0 where v_t lies outside the clip and the clipped term wins.

        Args:
            values: [B, S], gradient; garbage where masked.

        Source: OpenAI Baselines ppo2; the 37 Implementation Details of PPO (Huang et al., 2022), detail 9.
        """
        values, old, returns = (torch.where(batch.loss_mask, x, 0) for x in (values, batch.values, batch.returns))
        old, returns = old.detach().to(values.dtype), returns.detach().to(values.dtype)
        unclipped = bounded = (values - returns).square()
        if self.value_clip is not None:
            bounded = (values.clamp(old - self.value_clip, old + self.value_clip) - returns).square()
        error = returns - old
        return 0.5 * torch.maximum(unclipped, bounded), {
            "critic/clip_fraction": Metric((bounded > unclipped).to(values.dtype)),
            "critic/return_mean": Metric(returns),
            "critic/return_square": Metric(returns.square()),
            "critic/error_mean": Metric(error),
            "critic/error_square": Metric(error.square()),
        }

    @staticmethod
    def explained_variance(reduced: Mapping[str, float]) -> float:
        """1 - var(G - V) / (var(G) + 1e-5) of the reduced `value_metrics`: 1 where the values foretell the returns, 0 where a
        constant would do as well.
        """
        of_errors, of_returns = (
            max(0.0, reduced[f"critic/{name}_square"] - reduced[f"critic/{name}_mean"] ** 2) for name in ("error", "return")
        )
        return 1 - of_errors / (of_returns + 1e-5)
