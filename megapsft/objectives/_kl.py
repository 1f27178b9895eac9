"""The distance to the reference policy, estimated from the one token that was drawn."""

from __future__ import annotations

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0  # of ref_logprobs - logprobs; beyond it the gradient is 0
ESTIMATE_LIMIT = 10.0  # of the estimate itself; beyond it the gradient is 0


def k3(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """[B, S] clamp(exp(d) - d - 1, -10, 10) with d = clamp(ref_logprobs - logprobs, -20, 20); 0 where masked, whatever lies there.

    Gradient with respect to `logprobs`: 1 - exp(d) inside both clamps, else 0; `ref_logprobs` are constants.

    Source: Approximating KL Divergence (Schulman, 2020), k3; the clamps are those of verl.

    Args:
        logprobs: [B, S]; what lies under the mask is not read.
        ref_logprobs: [B, S], likewise.
        mask: [B, S] bool.
    """
    difference = torch.where(mask, ref_logprobs.detach(), 0) - torch.where(mask, logprobs, 0)
    difference = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return (difference.exp() - difference - 1).clamp(-ESTIMATE_LIMIT, ESTIMATE_LIMIT)
