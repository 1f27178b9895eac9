"""At which place a token stands among all words, by its logit."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def label_ranks(
    hidden: Tensor, weight: Tensor, labels: Tensor, group: dist.ProcessGroup | None, valid_vocab: int, chunk_bytes: int
) -> Tensor:
    """[T] int64, the same on every rank of `group`: 1 + the words that have a larger logit than the label; 1 is the likeliest.

    Args:
        hidden: [T, D] that the output layer reads.
        weight: [V / p, D], this rank's rows of the padded vocabulary; those beyond the true one do not count.
        labels: [T] int64, in [0, valid_vocab).
        chunk_bytes: of the logits of some tokens, as fp32.

    Example:
        logits [0.5, 2.0, 1.0], label 2 -> 2
    """
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    first = rank * len(weight)
    columns = max(0, min(valid_vocab - first, len(weight)))
    height = max(1, chunk_bytes // (4 * len(weight)))  # the same on all ranks, whose collectives are counted by it
    ranks = torch.ones_like(labels)
    for start in range(0, len(hidden), height):
        rows = slice(start, start + height)
        logits = (hidden[rows] @ weight[:columns].T).float()
        place = labels[rows] - first
        mine = (place >= 0) & (place < columns)
        own = logits.new_full((len(logits),), -torch.inf)
        own[mine] = logits[mine, place[mine]]
        if size > 1:
            dist.all_reduce(own, dist.ReduceOp.MAX, group=group)
        larger = (logits > own[:, None]).sum(dim=1)
        if size > 1:
            dist.all_reduce(larger, group=group)
        ranks[rows] += larger
    return ranks


__all__ = ["label_ranks"]
