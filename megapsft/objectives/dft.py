"""Dynamic fine-tuning: the negative log-likelihood, weighted by the probability that the policy gives the token already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megapsft.objectives._base import Base
from megapsft.objectives._per_token import PerToken
from megapsft.objectives._ratio import metrics_without_ratio
from megapsft.objectives._samples import at_tokens, sample_means, sample_sums
from megapsft.types import Metric, Microbatch, Over, PolicyOutput


@dataclass(frozen=True, kw_only=True)
class DFT(PerToken):
    """loss_t = -sg(W_t) l_t, minimised, with l_t the log-probability of token t, and

        token           W_t = exp(l_t)                         [B, S]
        sentence        W_t = exp(sum of l over the sample)
        geometric_mean  W_t = exp(mean of l over the sample)

    Gradient: dloss_t/dl_t = -W_t; in the logits, at level token, p_y (p - e_y), which vanishes both where the policy is sure
    of the token and where it rules it out. A probability that underflows is a weight of 0, and so is its loss.

    The paper's Eq. 9 sums over tokens (aggregation = seq-mean-token-sum); its code takes the token mean, as here.

    Source: On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification (Wu et al., 2025),
    Eq. 9; the other two levels: its Table 8.

    Example:
        three tokens, level = token

        logprobs [-0.2,    -1.1,    -0.05]
        weight   [ 0.8187,  0.3329,  0.9512]
        ->       [ 0.1637,  0.3662,  0.0476], their token mean is 0.1925
        gradient [-0.8187, -0.3329, -0.9512], before the weights of 1/3
    """

    metrics: ClassVar[Mapping[str, Over]] = Base.metrics | {"objective/weight_mean": "mean", "objective/weight_min": "min"}
    level: Literal["token", "sentence", "geometric_mean"] = "token"  # whose probability weighs: the token's, the response's

    def __call__(self, output: PolicyOutput, batch: Microbatch) -> tuple[Tensor, Mapping[str, Metric]]:
        """Losses [B, S] of the dtype of `output.logprobs`, 0 where masked, and the metrics."""
        logprobs = torch.where(batch.loss_mask, output.logprobs, 0)
        weight = self._weight(logprobs.detach(), batch)
        loss = torch.where(weight > 0, -weight * logprobs, 0)  # 0 * -inf, where the policy rules a token out
        return loss, {
            **metrics_without_ratio(logprobs),
            "objective/weight_mean": Metric(weight),
            "objective/weight_min": Metric(weight, "min"),
        }

    def _weight(self, logprobs: Tensor, batch: Microbatch) -> Tensor:
        """[B, S]; anything where masked."""
        if self.level == "token":
            return logprobs.exp()
        over_sample = sample_sums if self.level == "sentence" else sample_means
        return at_tokens(over_sample(logprobs, batch), batch).exp()
