"""Weights in another dtype, and tied ones under both of their names."""

from __future__ import annotations

import torch
from torch import Tensor

from megapsft.checkpoint.weights import Stored, Weights
from megapsft.models.names import HF_EMBEDDING, HF_OUTPUT

WINDOWS = 2  # that a read holds beside its output


class Cast:
    """Tensors rounded to `dtype`, to nearest even; those that have it already pass as they are."""

    def __init__(self, weights: Weights, dtype: torch.dtype):
        self._weights = weights
        self.tensors = {name: Stored(stored.shape, dtype) for name, stored in weights.tensors.items()}

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        stored = self._weights.tensors[name].dtype
        if stored == out.dtype:
            self._weights.read(name, start, stop, out)
            return
        rows = torch.empty(out.shape, dtype=stored)
        self._weights.read(name, start, stop, rows)
        out.copy_(rows)


class Tied:
    """Weights whose embedding is stored a second time, as the output layer."""

    def __init__(self, weights: Weights):
        self._weights = weights
        self.tensors = {}
        for name, stored in weights.tensors.items():
            self.tensors[name] = stored
            if name == HF_EMBEDDING:
                self.tensors[HF_OUTPUT] = stored

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        self._weights.read(HF_EMBEDDING if name == HF_OUTPUT else name, start, stop, out)
