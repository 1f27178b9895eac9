"""Sums over whole samples, wherever their tokens lie: packed end to end, in rows, and cut over context-parallel ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megapsft.types import Microbatch


def sample_sums(values: Tensor, batch: Microbatch) -> Tensor:
    """Sum of `values` over the trained tokens of each sample.

    Args:
        values: [B, S]; what lies under the mask is not read. Gradients do not pass: an objective over sequences writes its
            gradient as a constant for each token times that token's log-probability.

    Returns:
        [batch.samples], of the samples of the update; 0 for those of other microbatches. The same on all ranks that share them.
    """
    values = torch.where(batch.loss_mask, values.detach(), 0)
    sums = values.new_zeros(batch.samples + 1)  # the last is padding's
    sums.index_add_(0, batch.sample_ids.flatten() % (batch.samples + 1), values.flatten())
    if batch.context_group is not None:
        dist.all_reduce(sums, group=batch.context_group)
    return sums[:-1]


def sample_lengths(batch: Microbatch, dtype: torch.dtype) -> Tensor:
    """[batch.samples] trained tokens of each sample."""
    return sample_sums(torch.ones(batch.loss_mask.shape, dtype=dtype, device=batch.loss_mask.device), batch)


def sample_means(values: Tensor, batch: Microbatch) -> Tensor:
    """[batch.samples] mean of `values` [B, S] over the trained tokens of each sample; 0 where there are none."""
    return sample_sums(values, batch) / sample_lengths(batch, values.dtype).clamp(min=1)


def at_tokens(per_sample: Tensor, batch: Microbatch) -> Tensor:
    """[B, S] the value of the token's sample, 0 on padding; `per_sample` is [batch.samples]."""
    padded = torch.cat([per_sample, per_sample.new_zeros(1)])
    return padded[batch.sample_ids % (batch.samples + 1)]
