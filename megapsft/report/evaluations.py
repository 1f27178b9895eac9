"""What benchmarks said while runs were trained, as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megapsft.errors import Refused
from megapsft.metrics.shown import Table
from megapsft.report.figure import Chart, Line
from megapsft.report.png import write_png
from megapsft.report.table import percent

Point = tuple[float, float, float]  # step, value, its standard error


def draw_evaluations(runs: Mapping[str, Sequence[Point]], quantity: str, out_png: str | Path) -> None:
    """Draw the chart of `evaluation_chart`.

    Raises:
        Refused: no runs, a run without points, or matplotlib is not installed.
    """
    write_png([evaluation_chart(runs, quantity)], out_png)


def evaluation_chart(runs: Mapping[str, Sequence[Point]], quantity: str) -> Chart:
    """Each run as a line over steps, with a band of two standard errors to either side.

    Args:
        runs: label -> its points.
        quantity: what the values are, with their unit.

    Raises:
        Refused: no runs, or a run without points.
    """
    if not runs or not all(runs.values()):
        raise Refused("the picture", "needs runs, each with a point at least", "set evaluate.data before they are trained")
    lines = []
    for colour, (name, points) in enumerate(runs.items()):
        steps, values, errors = zip(*points, strict=True)
        low, high = ([v + sign * 2 * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1))
        lines.append(Line(name=name, x=steps, y=values, low=low, high=high, colour=colour))
    title = f"{quantity}, bands of two standard errors"
    return Chart(name="evaluations", title=title, x_label="steps", y_label=quantity, lines=lines)


def benchmarks_of(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Of each benchmark the average score over steps, of the records of evaluations.jsonl."""
    found: dict[str, list[Point]] = {}
    for record in records:
        for name, own in _by_benchmark(record).items():
            error = own["avg_se"]
            found.setdefault(name, []).append((record["step"], own["avg"], math.nan if error is None else error))
    return found


def evaluations_of(records: Sequence[Mapping[str, Any]]) -> Table:
    """A line for each benchmark of each record: percent with standard errors, tokens, the share that was cut."""
    rows = []
    for record in records:
        for name, own in _by_benchmark(record).items():
            passes = [f"{key} {percent(own, key)}" for key in own if key.startswith("pass@") and not key.endswith("_se")]
            lengths = (f"{own['length']:.1f}", f"{own['unfinished']:.1%}")
            rows.append((str(record["step"]), name, percent(own, "avg"), ", ".join(passes), *lengths))
    return Table("evaluations", ("step", "benchmark", "avg@n", "pass@k", "length", "unfinished"), rows, texts=2)


def _by_benchmark(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Its keys `evaluate/<benchmark>/<key>`, of each benchmark by themselves."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in record.items():
        if key.startswith("evaluate/"):
            _, name, own = key.split("/", 2)
            found.setdefault(name, {})[own] = value
    return found


__all__ = ["Point", "benchmarks_of", "draw_evaluations", "evaluation_chart", "evaluations_of"]
