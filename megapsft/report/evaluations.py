"""What benchmarks said while runs were trained, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megapsft.errors import Refused
from megapsft.report.picture import LINES, need_matplotlib

Point = tuple[float, float, float]  # step, value, its standard error


def draw_evaluations(runs: Mapping[str, Sequence[Point]], quantity: str, out_png: str | Path) -> None:
    """Draw each run as a line over steps, with a band of two standard errors to either side.

    Args:
        runs: label -> its points.
        quantity: what the values are, with their unit.

    Raises:
        Refused: no runs, a run without points, or matplotlib is not installed.
    """
    need_matplotlib("the picture")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not runs or not all(runs.values()):
        raise Refused("the picture", "needs runs, each with a point at least", "set evaluate.data before they are trained")
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (label, points), colour in zip(runs.items(), LINES * len(runs), strict=False):
        steps, values, errors = zip(*points, strict=True)
        axes.plot(steps, values, marker="o", markersize=4, color=colour, label=label)
        low, high = ([v + sign * 2 * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="Step", ylabel=quantity, title=f"{quantity}, bands of two standard errors")
    axes.grid(alpha=0.3)
    axes.legend()
    Path(out_png).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png, dpi=130)


__all__ = ["Point", "draw_evaluations"]
