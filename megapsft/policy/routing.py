"""Recorded routing of microbatches that went through the model end to end as one, and of one that came in parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

Routing = Mapping[int, Tensor]
"""MoE layer -> [tokens, K] experts, as `megapsft.models.router.routed` records and chooses them again."""


def cut_routing(routing: Routing, lengths: Sequence[int], group: ProcessGroup | None) -> list[dict[int, Tensor]]:
    """The routing of each of several packed microbatches, out of that of one made by joining them along S. Collective.

    A rank's tokens of the whole are not its tokens of the parts: under sequence parallelism each rank holds one block of
    positions of whatever goes through the model.

    Args:
        lengths: S of each part, of this context-parallel slice; multiples of the size of `group`. They add up to the whole.
        group: the tensor-parallel ranks under sequence parallelism, None without.
    """
    if not routing:
        return [{} for _ in lengths]
    whole = _gather(routing, group).flatten(1, 2)  # [layers, tokens, K]
    rank, size = _place(group)
    parts = [part.chunk(size, dim=1)[rank] for part in whole.split(list(lengths), dim=1)]
    return [dict(zip(routing, part.contiguous(), strict=True)) for part in parts]


def join_routing(parts: Sequence[Routing], group: ProcessGroup | None) -> dict[int, Tensor]:
    """The routing of packed microbatches joined along S, out of that of each: the inverse of `cut_routing`. Collective."""
    if not parts[0]:
        return {}
    own = [len(next(iter(part.values()))) for part in parts]
    gathered = _gather({layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}, group)
    whole = torch.cat([part.flatten(1, 2) for part in gathered.split(own, dim=2)], dim=1)  # [layers, tokens, K]
    rank, size = _place(group)
    return dict(zip(parts[0], whole.chunk(size, dim=1)[rank].contiguous(), strict=True))


def _gather(routing: Routing, group: ProcessGroup | None) -> Tensor:
    """[layers, ranks, tokens of a rank, K] of the ranks' routings."""
    mine = torch.stack(list(routing.values()))
    if group is None:
        return mine[:, None]
    raw = mine.view(torch.uint8)  # no backend sends integers of 16 bits
    everyone = raw.new_empty((group.size() * len(raw), *raw.shape[1:]))
    dist.all_gather_into_tensor(everyone, raw, group=group)
    return everyone.view(mine.dtype).unflatten(0, (group.size(), -1)).transpose(0, 1)


def _place(group: ProcessGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (group.rank(), group.size())


__all__ = ["Routing", "cut_routing", "join_routing"]
