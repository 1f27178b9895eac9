"""From what runs recorded to charts: a line for each run and quantity, the warm-up shaded, ends of epochs marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from megapsft.report.figure import Chart, Line, Mark, Span, Switched
from megapsft.report.picture import LINES
from megapsft.report.run import AXES, Axis, Run, series

EPOCHS = 12  # ends of epochs that are marked, at most


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What is drawn of each run that recorded it."""

    name: str  # of files and anchors
    title: str
    unit: str
    keys: dict[str, str]  # key of the records -> what it is called beside the run; the first is drawn solid
    of: Literal["updates", "steps", "evaluations"] = "updates"
    size: float = 1.0  # what values are divided by
    log_y: bool = False
    epochs: bool = False  # whether their ends are marked
    dots: bool = False
    errors: bool = False  # two standard errors to either side, of KEY_se
    note: str = ""


def switched(curve: Curve, runs: Sequence[Run]) -> Switched | None:
    """The chart over every x axis; None where no run recorded a number of it."""
    charts = {axis: chart(curve, runs, axis) for axis in AXES}
    known = any(math.isfinite(value) for line in charts["update"].lines for value in line.y)
    return Switched(charts=charts) if known else None


def chart(curve: Curve, runs: Sequence[Run], axis: Axis = "update") -> Chart:
    """The lines of all runs that have any of the keys. One run has a colour for each key, several one for each run."""
    lines = [line for run in runs for line in _lines(curve, run, axis, alone=len(runs) == 1)]
    return Chart(
        name=curve.name,
        title=curve.title,
        x_label=AXES[axis],
        y_label=curve.unit,
        lines=lines,
        spans=warmups(runs, axis),
        marks=epochs(runs, axis) if curve.epochs else (),
        log_y=curve.log_y,
        note=curve.note,
    )


def _lines(curve: Curve, run: Run, axis: Axis, alone: bool) -> list[Line]:
    records = [record for record in getattr(run, curve.of) if math.isfinite(run.at(record, axis))]
    x = [run.at(record, axis) for record in records]
    found = []
    for number, (key, called) in enumerate(curve.keys.items()):
        if not any(record.get(key) is not None for record in records):
            continue
        y = [value / curve.size for value in series(records, key)]
        ends = {}
        if curve.errors:
            half = [2 * error / curve.size for error in series(records, f"{key}_se")]
            ends = {side: [v + sign * h for v, h in zip(y, half, strict=True)] for side, sign in (("low", -1), ("high", 1))}
        colour, dashed = (number, False) if alone else (run.colour, number > 0 or run.colour >= len(LINES))
        name = f"{run.name} {called}".strip()
        found.append(Line(name=name, x=x, y=y, colour=colour, dashed=dashed, dots=curve.dots, **ends))
    return found


def warmups(runs: Sequence[Run], axis: Axis) -> list[Span]:
    """The warm-up, up to the end of the longest; with the run's name where not all have one."""
    ends = {run.name: run.at(run.warmup, axis) for run in runs if run.warmup is not None}
    ends = {name: end for name, end in ends.items() if math.isfinite(end)}
    if not ends:
        return []
    longest = max(ends, key=ends.__getitem__)
    begins = min((run.at(run.updates[0], axis) for run in runs if run.updates), default=0.0)
    shared = len(ends) == len(runs)
    return [Span(begins, ends[longest], "warm-up" if shared else f"warm-up of {', '.join(ends)}")]


def epochs(runs: Sequence[Run], axis: Axis) -> list[Mark]:
    """The ends of epochs, once where all runs have the same, else in the colour of their run."""
    of_runs = {run.name: _epochs(run, axis) for run in runs}
    shown = [ends for ends in of_runs.values() if ends]
    if not shown:
        return []
    if all(ends == shown[0] for ends in shown) and len(shown) == len(runs):
        return [Mark(at, f"epoch {number}") for number, at in _some(shown[0])]
    return [
        Mark(at, f"epoch {number}", None if len(runs) == 1 else run.colour)
        for run in runs
        for number, at in _some(of_runs[run.name])
    ]


def _epochs(run: Run, axis: Axis) -> list[tuple[int, float]]:
    """(epoch, where it ends), between two steps where it ends within one."""
    known = [(record["epoch"], run.at(record, axis)) for record in run.steps if record.get("epoch") is not None]
    known = [(0.0, 0.0), *((epoch, at) for epoch, at in known if math.isfinite(at))]
    found = []
    for (before, start), (after, end) in pairwise(known):
        for number in range(math.floor(before) + 1, math.floor(after) + 1):
            found.append((number, start + (end - start) * (number - before) / (after - before)))
    return found


def _some(ends: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    """Every so many, where there are more than can be told apart."""
    every = -(-len(ends) // EPOCHS) or 1
    return [end for end in ends if end[0] % every == 0]


__all__ = ["Curve", "chart", "epochs", "switched", "warmups"]
