"""What every tracker does: TensorBoard, Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from megapsft.metrics.shown import Shown


class Tracker(Protocol):
    """A page of one run, over `update`."""

    note: str | None  # what the user should know of a run that goes on

    def write(self, scalars: Mapping[str, float], update: int) -> None: ...

    def show(self, shown: Sequence[Shown], update: int) -> None:
        """Pictures and tables, each under its name; those of later updates stand beside."""

    def close(self) -> None: ...


def missing(otherwise: str) -> str:
    """The remedy, where the package of a tracker is not there."""
    return f"pip install 'megapsft[track]', or set {otherwise}"


__all__ = ["Tracker", "missing"]
