"""A run is a few phases one after the other: a warm-up, the critic alone, then training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Consecutive records of one phase."""

    name: str  # "warmup", "critic" or "train"
    objective: str
    records: tuple[dict[str, Any], ...]

    @property
    def title(self) -> str:
        return f"{'warm-up' if self.name == 'warmup' else self.name} ({self.objective.upper()})"

    def values(self, key: str) -> list[float]:
        """Of the records that have a finite number under `key`."""
        return [record[key] for record in self.records if record.get(key) is not None]


def phases(records: Sequence[dict[str, Any]]) -> list[Phase]:
    """Cut records, in their order, where the phase changes.

    Example:
        >>> [phase.title for phase in phases(records)]
        ['warm-up (SFT)', 'train (PSFT)']
    """
    cut = groupby(records, key=lambda record: (record.get("phase", "train"), record.get("objective", "")))
    return [Phase(name=name, objective=objective, records=tuple(part)) for (name, objective), part in cut]
