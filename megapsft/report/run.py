"""A run as its folder tells it, and where its records lie on an x axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from megapsft.report.phases import Phase, phases

Record = Mapping[str, Any]
Axis = Literal["update", "step", "samples"]
AXES: dict[Axis, str] = {"update": "updates", "step": "steps", "samples": "samples"}  # -> what the axis counts


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run recorded."""

    name: str  # no other run that is shown has it
    colour: int = 0
    folder: Path | None = None
    updates: Sequence[Record] = ()  # metrics.jsonl
    steps: Sequence[Record] = ()  # steps.jsonl
    evaluations: Sequence[Record] = ()  # evaluations.jsonl
    config: Mapping[str, Any] = field(default_factory=dict)  # key of config.yaml, with dots -> value
    revision: str = ""  # revision.txt
    noise: Mapping[str, Any] = field(default_factory=dict)  # noise.json

    @cached_property
    def phases(self) -> list[Phase]:
        return phases([dict(record) for record in self.updates])

    @property
    def warmup(self) -> Record | None:
        """The last record of the warm-up."""
        return next((phase.records[-1] for phase in reversed(self.phases) if phase.name == "warmup"), None)

    def at(self, record: Record, axis: Axis) -> float:
        """Where a record of any of the files lies, at the end of its update; nan where that is not known."""
        update = record["update"]
        if axis == "update":
            return float(update)
        return self._places.get(update, {}).get(axis, math.nan)

    @cached_property
    def _places(self) -> dict[int, dict[str, float]]:
        """Of each update: steps done, in parts where a step has several updates, and samples trained on so far."""
        updates_of: dict[Any, int] = {}
        for record in self.updates:
            updates_of[record.get("step")] = updates_of.get(record.get("step"), 0) + 1
        found: dict[int, dict[str, float]] = {0: {"step": 0.0, "samples": 0.0}}
        samples, done, last = 0.0, 0, None
        for record in self.updates:
            step = record.get("step")
            done, last = (done + 1 if step == last else 1), step
            samples += math.nan if record.get("data/samples") is None else record["data/samples"]
            part = math.nan if step is None else step - 1 + done / updates_of[step]
            found[record["update"]] = {"step": part, "samples": samples}
        return found


def series(records: Sequence[Record], key: str) -> list[float]:
    """[n] values over the records, nan (a gap in the line) where a record has none."""
    return [math.nan if record.get(key) is None else float(record[key]) for record in records]


__all__ = ["AXES", "Axis", "Record", "Run", "series"]
