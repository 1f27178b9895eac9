"""How often each word of the vocabulary was trained, and how often its loss was clipped."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Counted(NamedTuple):
    """Words that were trained at least once, by token id, ascending."""

    ids: list[int]
    trained: list[int]
    clipped: list[int]


class TokenCounts:
    """Counts of this rank, in two vectors of vocabulary size on the device; nothing waits for it until they are taken.

    Args:
        vocab_size: rows of the embedding.
    """

    def __init__(self, vocab_size: int, device: torch.device | str = "cpu"):
        self._total = torch.zeros(2, vocab_size, dtype=torch.int64, device=device)  # trained, clipped
        self._update = torch.zeros_like(self._total)

    def add(self, labels: Tensor, mask: Tensor, clipped: Tensor) -> None:
        """Take in one microbatch.

        Args:
            labels: [B, S] int64, within the vocabulary also where masked.
            mask: [B, S] bool, of the trained tokens.
            clipped: [B, S] bool.
        """
        for row, there in zip(self._update, (mask, mask & clipped), strict=True):
            row.index_add_(0, labels.flatten(), there.flatten().long())

    def end_update(self, skipped: bool) -> None:
        """The update is done; where it was skipped its tokens were not trained."""
        if not skipped:
            self._total += self._update
        self._update.zero_()

    def take(self) -> Counted:
        """Collective. The counts of all ranks since they were taken last, the same on each."""
        dist.all_reduce(self._total)
        ids = self._total[0].nonzero()[:, 0]
        found = Counted(ids.tolist(), *self._total[:, ids].tolist())
        self._total.zero_()
        return found


__all__ = ["Counted", "TokenCounts"]
