"""Adapters before the first step: A at random, B zero, so that the model is at first what it is without them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megapsft.models.adapters import B
from megapsft.models.parameters import Index, Rule


class Drawn:
    """Matrices of adapters by their names in PEFT, whole ones in fp32, from a seed and the name: the same for every split.

    A is uniform in +-1 / sqrt(inputs), which is PEFT's default, kaiming_uniform with a = sqrt(5).

    Args:
        rules: of the adapters.
    """

    def __init__(self, rules: Sequence[Rule], seed: int):
        self._shapes, self._seed = {rule.hf: rule.shape for rule in rules}, seed

    def read(self, name: str, index: Index) -> Tensor:
        """A part of a matrix."""
        shape = self._shapes[name]
        if name.endswith(B):
            return torch.zeros(shape)[index]
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) // 2)
        bound = 1 / math.sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)[index]
