"""Where converted weights go: files whose every byte has its place before the first is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from megapsft.checkpoint.weights import Stored


class Target(Protocol):
    """A checkpoint that is being written; several threads may write at once, in any order."""

    tensors: Mapping[str, Stored]  # Hugging Face's, all of which must be written

    @property
    def nbytes(self) -> int:
        """Of the finished files."""
        ...

    def is_there(self) -> bool:
        """Whether all files are, in their whole size, so that an earlier attempt can be gone on with."""
        ...

    def open(self) -> None:
        """Make the files, in their whole size; those of an earlier attempt are gone on with. Raises Refused on a full disk."""
        ...

    def write(self, name: str, start: int, data: Tensor) -> None:
        """Put rows from `start` on, as uint8, in their place; fastest from memory that begins at a whole page."""
        ...

    def sync(self) -> None:
        """Return when all that was written is on the disk."""
        ...

    def close(self) -> None:
        """Write what makes the files a checkpoint: only now can it be read."""
        ...
