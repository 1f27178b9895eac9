"""What benchmarks said while runs were trained, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megapsft.errors import Refused
from megapsft.report.figure import Chart, Line
from megapsft.report.png import write_png

Point = tuple[float, float, float]  # step, value, its standard error


def draw_evaluations(runs: Mapping[str, Sequence[Point]], quantity: str, out_png: str | Path) -> None:
    """Draw each run as a line over steps, with a band of two standard errors to either side.

    Args:
        runs: label -> its points.
        quantity: what the values are, with their unit.

    Raises:
        Refused: no runs, a run without points, or matplotlib is not installed.
    """
    if not runs or not all(runs.values()):
        raise Refused("the picture", "needs runs, each with a point at least", "set evaluate.data before they are trained")
    lines = []
    for colour, (name, points) in enumerate(runs.items()):
        steps, values, errors = zip(*points, strict=True)
        low, high = ([v + sign * 2 * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1))
        lines.append(Line(name=name, x=steps, y=values, low=low, high=high, colour=colour))
    title = f"{quantity}, bands of two standard errors"
    write_png([Chart(name="evaluations", title=title, x_label="steps", y_label=quantity, lines=lines)], out_png)


__all__ = ["Point", "draw_evaluations"]
