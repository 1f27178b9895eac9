"""Some of the tensors of a checkpoint: its language model, and what is carried along beside it, such as a vision tower."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from megapsft.checkpoint.weights import Stored, Weights
from megapsft.checkpoint.weights.fp8 import FP8
from megapsft.checkpoint.weights.hf import some
from megapsft.errors import Refused
from megapsft.models.family import Family


class Part:
    """Those of `names`, in that order."""

    def __init__(self, weights: Weights, names: Iterable[str]):
        self._weights = weights
        self.tensors: dict[str, Stored] = {name: weights.tensors[name] for name in names}

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        self._weights.read(name, start, stop, out)

    def places(self) -> Iterator[tuple[Path, int, int]]:
        """(file, first byte, bytes) of all data in the files that it is a part of, where they are files."""
        yield from self._weights.places()


def language_model(weights: Weights, family: Family) -> Weights:
    """The weights without what is carried along; themselves where the family has nothing of it."""
    if family.carried is None:
        return weights
    return Part(weights, [name for name in weights.tensors if not name.startswith(family.carried)])


def carried(weights: Weights, family: Family) -> Part | None:
    """What is carried along, as it is stored; None where the family has nothing of it.

    Raises:
        Refused: none of it is there, or it is in FP8, which is left to be told from config.json alone.
    """
    if family.carried is None:
        return None
    part = Part(weights, [name for name in weights.tensors if name.startswith(family.carried)])
    if not part.tensors:
        rule = f"has no tensors {family.carried}*, which {family.architecture} has beside its language model"
        raise Refused("checkpoint", rule, "download it again, or name a folder that is whole")
    quantised = [name for name, stored in part.tensors.items() if stored.dtype == FP8]
    if quantised:
        rule = f"{len(quantised)} tensors that are carried along as they are are in FP8: {some(quantised)}"
        raise Refused("checkpoint", rule, "use the checkpoint in bfloat16")
    return part
