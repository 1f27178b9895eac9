"""The distance to the reference policy, estimated from the one token that is there."""

from __future__ import annotations

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0  # of ref_logprobs - logprobs; beyond it the gradient is 0
ESTIMATE_LIMIT = 10.0  # of the estimate; beyond it the gradient is 0


def k3(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """[B, S] min(exp(d) - d - 1, 10) with d = clamp(ref_logprobs - logprobs, -20, 20); 0 where masked, whatever lies there.

    Nats, never negative. The gradient is that of `logprobs`, 1 - exp(d) inside both limits, else 0; `ref_logprobs` are constants.
    Its mean is KL(policy || reference) only over tokens that the policy sampled.

    Source: Approximating KL Divergence (Schulman, 2020), k3; the limits are verl's.
    """
    difference = torch.where(mask, ref_logprobs.detach(), 0) - torch.where(mask, logprobs, 0)
    difference = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return (torch.expm1(difference) - difference).clamp(max=ESTIMATE_LIMIT)  # exp(d) - 1 would cancel where d is small
