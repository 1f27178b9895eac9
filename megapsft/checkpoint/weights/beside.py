"""Several Weights as one, such as a base and the adapter beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from megapsft.checkpoint.weights import Stored, Weights


class Beside:
    """The tensors of all of them, in that order; no two may have the same name."""

    def __init__(self, *parts: Weights):
        self._of = {name: weights for weights in parts for name in weights.tensors}
        self.tensors: dict[str, Stored] = {name: weights.tensors[name] for name, weights in self._of.items()}
        self._parts = parts
        assert len(self.tensors) == sum(len(weights.tensors) for weights in parts)

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        self._of[name].read(name, start, stop, out)

    def places(self) -> Iterator[tuple[Path, int, int]]:
        """(file, first byte, bytes) of all data, where all parts are files."""
        for part in self._parts:
            yield from part.places()
