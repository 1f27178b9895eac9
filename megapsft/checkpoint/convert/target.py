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


class Together:
    """Several Targets as one; no two may have a tensor of the same name."""

    def __init__(self, *targets: Target):
        self._targets = targets
        self._of = {name: target for target in targets for name in target.tensors}
        self.tensors: dict[str, Stored] = {name: target.tensors[name] for name, target in self._of.items()}

    @property
    def nbytes(self) -> int:
        return sum(target.nbytes for target in self._targets)

    def is_there(self) -> bool:
        return all(target.is_there() for target in self._targets)

    def open(self) -> None:
        for target in self._targets:
            target.open()

    def write(self, name: str, start: int, data: Tensor) -> None:
        self._of[name].write(name, start, data)

    def sync(self) -> None:
        for target in self._targets:
            target.sync()

    def close(self) -> None:
        for target in self._targets:
            target.close()
