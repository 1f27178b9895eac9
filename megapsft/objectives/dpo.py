"""Direct preference optimisation: the chosen response against the rejected one, both relative to the reference policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megapsft.errors import Refused
from megapsft.objectives._base import Base
from megapsft.objectives._ratio import metrics_without_ratio
from megapsft.objectives._samples import at_tokens, sample_lengths, sample_sums
from megapsft.types import Metric, Microbatch, Over, PolicyOutput


@dataclass(frozen=True, kw_only=True)
class DPO(Base):
    """L = mean over the pairs of -(1 - s) log sigmoid(u) - s log sigmoid(-u), minimised, with

        u = beta ((l_chosen - l_ref_chosen) - (l_rejected - l_ref_rejected))         sums over the trained tokens of a side
        s = label_smoothing, the share of pairs whose label is taken to be wrong

    Sample 2k of the update is the chosen side of pair k, sample 2k + 1 the rejected one, in the same microbatch. Gradient, with
    B pairs in the update: -beta ((1 - s) sigmoid(-u) - s sigmoid(u)) / B on every trained token of the chosen side, and the
    opposite on the rejected side. The policy at the reference has the loss log 2.

    Per token: a token carries that gradient, and its part of the value of its pair, value / (B n), with n the trained tokens of
    the pair, both sides. Loss weights are 1 (token-sum). A side without trained tokens has the log-probability 0, and its pair
    counts; a pair without any has nowhere to put its constant log 2, and is left out of value and metrics, not out of B.

    Source: Direct Preference Optimization (Rafailov et al., NeurIPS 2023), Eq. 7; label smoothing: A Note on DPO with Noisy
    Preferences (Mitchell, 2023), Eq. 3; beta = 0.01: PSFT (Zhu et al., ICLR 2026), Table 14. Metrics as in TRL.

    Example:
        one pair, two tokens chosen and one rejected, beta = 0.1

        logprobs     [-0.2,   -1.1],   [-0.4]
        ref_logprobs [-0.5,   -0.9],   [-1.0]      rewards 0.01 and 0.06, u = -0.05
        ->           [ 0.2395, 0.2395], [0.2395],  their sum is 0.7185
        gradient     [-0.0512, -0.0512], [0.0512]
    """

    needs: ClassVar[frozenset[str]] = frozenset({"ref_logprobs"})
    trains_on: ClassVar[frozenset[str]] = frozenset({"preferences"})
    aggregation: ClassVar[str] = "token-sum"
    max_response_length: ClassVar[int | None] = None
    metrics: ClassVar[Mapping[str, Over]] = Base.metrics | {
        "rewards/chosen": "mean",
        "rewards/rejected": "mean",
        "rewards/margins": "mean",
        "rewards/accuracies": "mean",
        "logps/chosen": "mean",
        "logps/rejected": "mean",
    }
    beta: float = 0.01  # how far the policy may leave the reference: larger is nearer
    label_smoothing: float = 0.0  # share of pairs whose label is taken to be wrong

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise Refused(f"beta={self.beta}", "must be above 0", "the paper of PSFT uses 0.01, that of DPO 0.1")
        if not 0 <= self.label_smoothing <= 0.5:
            rule = "must lie in 0..0.5: beyond a half the rejected side would be the better one"
            raise Refused(f"label_smoothing={self.label_smoothing}", rule, "0 is plain DPO")

    def __call__(self, output: PolicyOutput, batch: Microbatch) -> tuple[Tensor, Mapping[str, Metric]]:
        """Losses [B, S] of the dtype of `output.logprobs`, 0 where masked, and the metrics; means of `rewards` and `logps` are
        over pairs.
        """
        logprobs = torch.where(batch.loss_mask, output.logprobs, 0)
        constant = logprobs.detach()
        log_ratio = constant - torch.where(batch.loss_mask, batch.ref_logprobs, 0)
        logps = _pairs(sample_sums(constant, batch))
        rewards = self.beta * _pairs(sample_sums(log_ratio, batch))
        tokens = _pairs(sample_lengths(batch, constant.dtype)).sum(dim=1)

        margins, smoothing = rewards[:, 0] - rewards[:, 1], self.label_smoothing
        values = -(1 - smoothing) * logsigmoid(margins) - smoothing * logsigmoid(-margins)
        slopes = -self.beta * ((1 - smoothing) * torch.sigmoid(-margins) - smoothing * torch.sigmoid(margins))

        def spread(of_chosen: Tensor, of_rejected: Tensor) -> Tensor:
            at = at_tokens(torch.stack((of_chosen, of_rejected), dim=1).flatten(), batch)
            return torch.where(batch.loss_mask, at, 0)

        share = spread(1 / tokens, 1 / tokens)
        loss = (spread(values, values) * share + spread(slopes, -slopes) * (logprobs - constant)) / len(tokens)
        of_pairs = {
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1],
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).to(margins.dtype),
            "logps/chosen": logps[:, 0],
            "logps/rejected": logps[:, 1],
        }
        means = {key: Metric(spread(value, value), weights=share) for key, value in of_pairs.items()}
        return loss, metrics_without_ratio(logprobs) | means


def _pairs(of_samples: Tensor) -> Tensor:
    """[samples] -> [samples / 2, 2]: of the chosen side and of the rejected one."""
    return of_samples.view(-1, 2)
