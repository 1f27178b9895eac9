"""GEM: the likelihood of the demonstration against a sharpened copy of the policy, which keeps the policy's diversity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megapsft.errors import Refused
from megapsft.objectives._per_token import PerToken
from megapsft.objectives._ratio import metrics_without_ratio
from megapsft.types import Metric, Microbatch, PolicyOutput, VocabularyTerm


@dataclass(frozen=True, kw_only=True)
class GEM(PerToken):
    """loss_t = sum_v q_v h_v (log p_v - log p_y), minimised, at each trained position, over the whole vocabulary, with

        p = softmax(z), q = sg(softmax(z / beta))              z the logits, y the demonstration token
        h_v = 1 (linear), or sg(sigmoid(0.01 (z_v - z_y))) (logsigmoid)

    Gradient in the logits: q_v h_v - 1[v = y] sum_u q_u h_u, for linear h softmax(z / beta) - e_y: a token stops rising once
    the sharpened policy has it, long before the policy itself is all on it. With beta = 1 and linear h the gradient is SFT's
    (the value is not). The loss may be negative; the plain negative log-likelihood is `objective/nll`.

    logsigmoid is what the authors' script runs under the name gem; its h is about 1/2, and so is its gradient. linear is the
    default of their trainer, and here.

    Source: Preserving Diversity in Supervised Fine-Tuning of Large Language Models (Li et al., ICLR 2025).

    Example:
        three tokens over a vocabulary of two, the first of which is right; beta = 0.7, h = linear

        logits   [[2, 0], [0, 2], [1, 1]]
        ->       [-0.1086, 1.8914, 0], their token mean is 0.5942
        gradient [[-0.0543, 0.0543], [-0.9457, 0.9457], [-0.5, 0.5]], before the weights of 1/3
    """

    beta: float = 0.7  # below 1 the target is sharper than the policy; at 1 the gradient is that of SFT
    h: Literal["linear", "logsigmoid"] = "linear"  # weights of the vocabulary: 1, or sigmoid(0.01 (z_v - z_y))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise Refused(f"beta={self.beta}", "must be above 0: logits are divided by it", "the paper uses 0.7; 1 is SFT")

    @property
    def term(self) -> VocabularyTerm:
        return VocabularyTerm(kind="gem", beta=self.beta, h=self.h)

    def __call__(self, output: PolicyOutput, batch: Microbatch) -> tuple[Tensor, Mapping[str, Metric]]:
        """Losses [B, S] of the dtype of `output.term`, 0 where masked, and the metrics."""
        metrics = metrics_without_ratio(torch.where(batch.loss_mask, output.logprobs, 0))
        return torch.where(batch.loss_mask, output.term, 0), metrics
