"""Charts, histograms and bars as one PNG, side by side: for trackers, and for who has no browser at hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, BinaryIO

from megapsft.output.whole import whole
from megapsft.report.axis import Axis as Extent
from megapsft.report.axis import axis_of, written, x_axis
from megapsft.report.figure import Bars, Chart, Histogram, Line, Mark
from megapsft.report.picture import LINES, need_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#777777"
SHADE, EDGE = "#f3e9d2", "#b59b5b"
DPI = 130
KEYS = 6  # names in a row of the key
LETTER = 0.1  # inches of one, about


def write_png(figures: Sequence[Chart | Histogram | Bars], out: str | Path | BinaryIO, columns: int = 3) -> None:
    """Draw the figures in rows; folders are made.

    Args:
        out: a file, which is a PNG whatever its suffix, or what bytes are written to.

    Raises:
        Refused: matplotlib is not installed.
    """
    save(canvas(figures, columns), out)


def save(figure: Figure, out: str | Path | BinaryIO) -> None:
    if isinstance(out, str | Path):
        with whole(Path(out)) as place:
            figure.savefig(place, dpi=DPI, format="png")
    else:
        figure.savefig(out, dpi=DPI, format="png")


def canvas(figures: Sequence[Chart | Histogram | Bars], columns: int = 3) -> Figure:
    """The matplotlib figure, an axes for each of the figures in their order. One key above where all have the same one."""
    need_matplotlib("the picture")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, len(figures))
    rows = -(-len(figures) // columns)
    width = 5 if columns > 1 else 8  # inches of one, which has room for a key of long names
    sheet = Figure(figsize=(width * columns, (4 if columns > 1 else 5) * rows), layout="constrained")
    FigureCanvasAgg(sheet)
    cells = list(sheet.subplots(rows, columns, squeeze=False).flat)
    for axes, shown in zip(cells, figures, strict=False):
        axes.set_title(fill(shown.title, int(width / LETTER)), loc="left", fontsize=11, fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=9)
        {Chart: _chart, Histogram: _histogram, Bars: _bars}[type(shown)](axes, shown)
    for axes in cells[len(figures) :]:
        axes.set_axis_off()
    _keys(sheet, cells[: len(figures)])
    return sheet


def _keys(sheet: Figure, cells: Sequence[Axes]) -> None:
    named = [dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)) for axes in cells]
    everywhere = set.intersection(*map(set, named))
    largest = max(named, key=len)
    if all(set(names) <= set(largest) for names in named) and everywhere:
        if len(largest) > 1:
            fit = int(sheet.get_figwidth() / (0.7 + LETTER * max(map(len, largest))))
            columns = max(1, min(len(largest), KEYS, fit))
            sheet.legend(largest.values(), largest, loc="outside upper center", ncols=columns, frameon=False, fontsize=11)
        return
    for axes, names in zip(cells, named, strict=True):
        if len(names) > 1:
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12), "ncols": 3}  # where no bar or line is under it
            axes.legend(names.values(), names, frameon=False, fontsize=8, **below)


def _colour(number: int | None, tint: str | None = None) -> str:
    return tint or (GREY if number is None else LINES[number % len(LINES)])


def _scale(axes: Axes, side: str, axis: Extent) -> None:
    """A logarithmic axis has the ticks that the page has too."""
    if axis.log:
        getattr(axes, f"set_{side}scale")("log")
        getattr(axes, f"set_{side}ticks")(axis.ticks, [written(tick, 6) for tick in axis.ticks])
        getattr(axes, f"set_{side}ticks")([], minor=True)


def _chart(axes: Axes, chart: Chart) -> None:
    x = list(chain(*(line.x for line in chart.lines)))
    _scale(axes, "x", across := x_axis(x, log=chart.log_x))
    _scale(axes, "y", axis_of(chain(*(line.y for line in chart.lines)), log=chart.log_y))
    for line in chart.lines:
        _line(axes, line)
    for span in chart.spans:
        axes.axvspan(span.low, span.high, color=SHADE, zorder=0, label=span.name)
        axes.axvline(span.high, color=EDGE, linewidth=1, linestyle=":")
    _marks(axes, chart.marks)
    axes.set_xlim(across.low, across.high)
    axes.set_xlabel(chart.x_label, fontsize=9)
    axes.set_ylabel(chart.y_label, fontsize=9)


def _line(axes: Axes, line: Line) -> None:
    colour, dots = _colour(line.colour), line.dots or len(line.x) == 1
    style = {"color": colour, "linewidth": 1.6, "linestyle": "--" if line.dashed else "-", "marker": "o" if dots else None}
    axes.plot(line.x, line.y, label=line.name, markersize=4, clip_on=not dots, **style)  # those at the ends are seen whole
    if line.low is None or line.high is None:
        return
    if line.dots:
        axes.vlines(line.x, line.low, line.high, color=colour, linewidth=1)
    else:
        axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)


def _marks(axes: Axes, marks: Sequence[Mark]) -> None:
    for mark in marks:
        axes.axvline(mark.x, color=_colour(mark.colour), linewidth=0.8, linestyle=":")
        where = {"xycoords": ("data", "axes fraction"), "ha": "right", "va": "top"}
        axes.annotate(mark.name, (mark.x, 0.98), rotation=90, fontsize=7, **where)


def _histogram(axes: Axes, histogram: Histogram) -> None:
    filled = len(histogram.series) == 1
    for series in histogram.series:
        colour = _colour(series.colour, series.tint)
        axes.stairs(series.values, histogram.edges, color=colour, fill=filled, label=series.name)
    _scale(axes, "y", axis_of(chain(*(series.values for series in histogram.series)), log=histogram.log_y))
    _marks(axes, histogram.limits)
    axes.set_xlabel(histogram.x_label, fontsize=9)
    axes.set_ylabel(histogram.y_label, fontsize=9)


def _bars(axes: Axes, bars: Bars) -> None:
    height = 0.8 if bars.stacked else 0.8 / max(len(bars.series), 1)
    floor = [0.0] * len(bars.names)
    for number, series in enumerate(bars.series):
        offset = 0.0 if bars.stacked else (number - (len(bars.series) - 1) / 2) * height
        at = [place + offset for place in range(len(bars.names))]
        colour = _colour(series.colour, series.tint)
        drawn = axes.barh(at, series.values, height, left=floor, xerr=series.errors, color=colour, label=series.name)
        if bars.stacked:
            floor = [low + value for low, value in zip(floor, series.values, strict=True)]
        else:
            numbers = ["–" if math.isnan(value) else written(value, 3) for value in series.values]
            axes.bar_label(drawn, numbers, padding=4, fontsize=8)
            axes.margins(x=0.15)
    axes.set_yticks(range(len(bars.names)), bars.names)
    axes.invert_yaxis()
    axes.set_xlabel(bars.y_label, fontsize=9)


__all__ = ["canvas", "save", "write_png"]
