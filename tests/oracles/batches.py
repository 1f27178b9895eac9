"""A microbatch from bare numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from megapsft.data.loss_weights import loss_weights
from megapsft.types import Microbatch, Objective


def microbatch(mask: Tensor, weights: Tensor, **fields: Any) -> Microbatch:
    """One row a sample, [B, S], demonstrations without rewards unless `fields` of the microbatch say otherwise."""
    zeros = torch.zeros(mask.shape, dtype=torch.long)
    given = {
        "sample_ids": torch.arange(len(mask))[:, None].expand(mask.shape),
        "samples": len(mask),
        "demonstration": torch.ones(mask.shape, dtype=torch.bool),
        "rewards": torch.zeros(mask.shape),
        "advantages": torch.zeros(mask.shape),
    }
    return Microbatch(
        token_ids=zeros,
        labels=zeros,
        position_ids=zeros,
        loss_mask=mask,
        loss_weights=weights,
        cu_seqlens=None,
        max_seqlen=mask.shape[1],
        **given | fields,
    )


def weigh(mask: Tensor, aggregation: str, max_response_length: int | None, dtype: torch.dtype) -> Tensor:
    """The loss weights of an update that is all of `mask`: [B, S]."""
    rows = loss_weights(list(mask.numpy()), aggregation, max_response_length)
    return torch.stack([torch.as_tensor(row) for row in rows]).to(dtype)


def update_batch(objective: Objective, mask: Tensor, dtype: torch.dtype, **fields: Any) -> Microbatch:
    """The one microbatch of an update, weighed and counted as the training step does it."""
    batch = microbatch(mask, weigh(mask, objective.aggregation, objective.max_response_length, dtype), **fields)
    if objective.totals_need is None:
        return batch
    totals = {key: float(value) for key, value in objective.totals(batch).items()}
    return dataclasses.replace(batch, totals=totals)
