"""Weights by their Hugging Face names, some rows at a time: from a folder, a torch_dist checkpoint or a live model.

What changes weights on their way (a cast, FP8 scales, an adapter) is itself Weights that read from others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Stored(NamedTuple):
    """What a tensor is like, without its numbers."""

    shape: Shape
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        """Of the first dimension; a scalar is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_shape(self) -> Shape:
        return tuple(self.shape[1:])

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row_shape) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


class Weights(Protocol):
    """Tensors that are read a range of rows at a time; several threads may read at once."""

    tensors: Mapping[str, Stored]

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Fill `out`, [stop - start, *row shape] of the tensor's dtype, with its rows `start` to `stop`."""
        ...


def rows_of(weights: Weights, name: str, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows of a tensor, all of them unless said otherwise, as a new tensor."""
    stored = weights.tensors[name]
    stop = stored.rows if stop is None else stop
    out = torch.empty((stop - start, *stored.row_shape), dtype=stored.dtype)
    weights.read(name, start, stop, out)
    return out.reshape(stored.shape) if not stored.shape else out
