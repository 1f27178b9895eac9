"""A microbatch from bare numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from megapsft.data.loss_weights import loss_weights
from megapsft.objectives._per_token import PerToken
from megapsft.types import Microbatch


def microbatch(
    mask: Tensor, weights: Tensor, old_logprobs: Tensor | None = None, old_entropy: Tensor | None = None
) -> Microbatch:
    """One row a sample, [B, S]; what objectives over single tokens do not read is zero."""
    zeros = torch.zeros(mask.shape, dtype=torch.long)
    return Microbatch(
        token_ids=zeros,
        labels=zeros,
        position_ids=zeros,
        loss_mask=mask,
        loss_weights=weights,
        sample_ids=zeros,
        cu_seqlens=None,
        max_seqlen=mask.shape[1],
        old_logprobs=old_logprobs,
        old_entropy=old_entropy,
    )


def weigh(mask: Tensor, aggregation: str, max_response_length: int | None, dtype: torch.dtype) -> Tensor:
    """The loss weights of an update that is all of `mask`: [B, S]."""
    rows = loss_weights(list(mask.numpy()), aggregation, max_response_length)
    return torch.stack([torch.as_tensor(row) for row in rows]).to(dtype)


def update_batch(
    objective: PerToken, mask: Tensor, dtype: torch.dtype, old_logprobs: Tensor | None = None, old_entropy: Tensor | None = None
) -> Microbatch:
    """The one microbatch of an update, weighed as the training step weighs it."""
    weights = weigh(mask, objective.aggregation, objective.max_response_length, dtype)
    batch = microbatch(mask, weights, old_logprobs, old_entropy)
    selected = objective.select(batch)
    if selected is None:
        return batch
    rescale = mask.sum().to(dtype) / selected.sum().clamp(min=1)
    return microbatch(mask, weights * rescale, old_logprobs, old_entropy)
