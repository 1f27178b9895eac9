"""Supervised fine-tuning held near the reference policy by a KL divergence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megapsft.errors import Refused
from megapsft.objectives._kl import k3
from megapsft.objectives._per_token import PerToken
from megapsft.objectives._ratio import metrics_without_ratio
from megapsft.types import Metric, Microbatch, Over, PolicyOutput, VocabularyTerm


@dataclass(frozen=True, kw_only=True)
class SFTKL(PerToken):
    """loss_t = -l_t + kl_coef KL_t, minimised, with p the policy, q the frozen reference, and at each trained position

        reverse  KL_t = sum_v p_v (log p_v - log q_v)                  [B, S], the whole vocabulary
        forward  KL_t = sum_v q_v (log q_v - log p_v)                  likewise
        k3       KL_t = min(exp(d) - d - 1, 10), d = clamp(l_ref_t - l_t, -20, 20)

    Gradient in the logits z: p - e_y, and kl_coef times p_j (log p_j - log q_j - KL_t) (reverse), p_j - q_j (forward). With
    k3 dloss_t/dl_t = -1 + kl_coef (1 - exp(d)) inside both limits, else -1. kl_coef = 0 is SFT, and asks for no reference.

    The papers name neither direction nor estimator. Reverse is KL(policy || reference), what "KL to the base" means in RL;
    k3 on demonstration tokens, which the policy did not sample, estimates neither divergence, and is the cheap one.

    Source: the SFT-KL baseline of PSFT (Zhu et al., ICLR 2026), coefficient 0.5; SRFT (Fu et al., 2025) uses 0.2.

    Example:
        three tokens, kl = k3, kl_coef = 0.5

        logprobs     [-0.2,    -1.1,    -0.05]
        ref_logprobs [-0.5,    -0.9,    -0.4]
        KL           [ 0.0408,  0.0214,  0.0547]
        ->           [ 0.2204,  1.1107,  0.0773], their token mean is 0.4695
        gradient     [-0.8704, -1.1107, -0.8523], before the weights of 1/3
    """

    kl_coef: float = 0.5  # of the KL; 0 is plain SFT, without a reference
    kl: Literal["reverse", "forward", "k3"] = "reverse"  # over the full vocabulary, or k3: its cheap estimate

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.kl_coef >= 0:
            raise Refused(f"kl_coef={self.kl_coef}", "must be 0 or more", "PSFT's baseline uses 0.5, SRFT's 0.2; 0 is SFT")

    @property
    def needs(self) -> frozenset[str]:
        if self.kl_coef == 0:
            return frozenset()
        return frozenset({"ref_logprobs" if self.kl == "k3" else "ref_hidden"})

    @property
    def term(self) -> VocabularyTerm | None:
        if self.kl_coef == 0 or self.kl == "k3":
            return None
        return VocabularyTerm(kind="reverse_kl" if self.kl == "reverse" else "forward_kl")

    @property
    def metrics(self) -> Mapping[str, Over]:
        return super().metrics | ({"objective/kl": "mean"} if self.kl_coef else {})

    def __call__(self, output: PolicyOutput, batch: Microbatch) -> tuple[Tensor, Mapping[str, Metric]]:
        """Losses [B, S] of the dtype of `output.logprobs`, 0 where masked, and the metrics."""
        logprobs = torch.where(batch.loss_mask, output.logprobs, 0)
        metrics = metrics_without_ratio(logprobs)
        if self.kl_coef == 0:
            return -logprobs, metrics
        if self.term is None:
            kl = k3(logprobs, batch.ref_logprobs, batch.loss_mask)
        else:
            kl = torch.where(batch.loss_mask, output.term, 0)
        return -logprobs + self.kl_coef * kl, {**metrics, "objective/kl": Metric(kl.detach())}
