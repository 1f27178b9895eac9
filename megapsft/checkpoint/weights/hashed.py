"""The hashes of tensors as they are stored, taken while something else reads them."""

from __future__ import annotations

import hashlib
import threading
from typing import Any

from torch import Tensor

from megapsft.checkpoint.files.direct import as_bytes
from megapsft.checkpoint.weights import Weights


class Hashed:
    """Passes rows on; of a tensor that a thread read from its first row to its last, `sha256` has the hash."""

    def __init__(self, weights: Weights):
        self.unhashed, self.tensors = weights, weights.tensors
        self.sha256: dict[str, str] = {}
        self._under_way: dict[tuple[str, int], tuple[int, Any]] = {}  # by tensor and thread: the next row, and the hash so far

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        self.unhashed.read(name, start, stop, out)
        place = (name, threading.get_ident())
        row, digest = self._under_way.get(place, (0, None)) if start else (0, hashlib.sha256())
        if name in self.sha256 or digest is None or row != start:
            return  # known already, or not in order
        digest.update(as_bytes(out).numpy())
        self._under_way[place] = (stop, digest)
        if stop == self.tensors[name].rows:
            self.sha256[name] = digest.hexdigest()
            del self._under_way[place]

    def of(self, name: str) -> dict[str, str]:
        """The hashes of what a tensor is made of: itself, and where there are any, its FP8 scales."""
        return {read: self.sha256[read] for read in (name, f"{name}_scale_inv") if read in self.sha256}
