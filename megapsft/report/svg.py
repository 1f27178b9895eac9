"""Charts, histograms and bars as inline SVG. Colours are the stylesheet's (`style.py`), so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from itertools import chain, groupby

from megapsft.report.axis import Axis, axis_of, thinned, written, x_axis
from megapsft.report.figure import Bars, Chart, Histogram, Line, Mark, Numbers, Series
from megapsft.report.picture import LINES

WIDTH, HEIGHT = 380, 240  # of the view box: text stays readable where a phone shows it
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 24, 36
HOVERED = 60  # points of a line that say their numbers each
LETTER, SMALL = 6.4, 5.2  # width of one, about: of a label, and of a name inside the picture
ROW, BAR = 17, 11  # of bars: the line of a name, and the height of a bar


def drawing(figure: Chart | Histogram | Bars) -> str:
    """The <svg> element, with the figure in words for who cannot see it."""
    draw = {Chart: _chart, Histogram: _histogram, Bars: _bars}[type(figure)]
    height = _height(figure) if isinstance(figure, Bars) else HEIGHT
    label = escape(f"{figure.title}. {figure.words}")
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{"".join(draw(figure))}</svg>'


def coloured(colour: int | None, tint: str | None = None) -> str:
    """The attributes of an element that make --c its colour."""
    if tint is not None:
        return f'style="--c:{escape(tint)}"'
    return f'class="{"grey" if colour is None else f"c{colour % len(LINES)}"}"'


def _x(axis: Axis, value: float) -> float:
    return round(LEFT + (WIDTH - LEFT - RIGHT) * axis.at(value), 1)


def _y(axis: Axis, value: float) -> float:
    return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * axis.at(value), 1)


def _frame(x: Axis, y: Axis, x_label: str, y_label: str) -> Iterator[str]:
    """Lines at the ticks of y, the numbers of both axes, and their labels."""
    for tick in y.ticks:
        at = _y(y, tick)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>'
        yield f'<text x="{LEFT - 5}" y="{at + 4}" text-anchor="end">{written(tick, 6)}</text>'
    free = -math.inf
    for tick in x.ticks:
        at, half = _x(x, tick), LETTER * len(written(tick, 6)) / 2
        if at - half > free:
            where = min(at, WIDTH - half)
            yield f'<text x="{where}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{written(tick, 6)}</text>'
            free = at + half + 4
    yield f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>'
    yield f'<text class="label" x="2" y="11">{escape(y_label)}</text>'


def _chart(chart: Chart) -> Iterator[str]:
    x = x_axis(chain(*(line.x for line in chart.lines)), log=chart.log_x)
    ends = (values for line in chart.lines for values in (line.y, line.low, line.high) if values is not None)
    y = axis_of(chain(*ends), log=chart.log_y)
    for span in chart.spans:
        low, high = (_x(x, min(max(end, x.low), x.high)) for end in (span.low, span.high))
        box = f'x="{low}" y="{TOP}" width="{max(high - low, 0):.1f}" height="{HEIGHT - TOP - BOTTOM}"'
        yield f'<rect class="span" {box}><title>{escape(span.name)}</title></rect>'
        if high - low > SMALL * len(span.name):
            yield f'<text class="mark-name" x="{low + 4}" y="{HEIGHT - BOTTOM - 5}">{escape(span.name)}</text>'
    yield from _frame(x, y, chart.x_label, chart.y_label)
    yield from _marks(x, chart.marks)
    for line in chart.lines:
        yield from _line(x, y, line)


def _marks(x: Axis, marks: tuple[Mark, ...]) -> Iterator[str]:
    """Dotted lines; their names as far as there is room."""
    free = -math.inf
    for mark in sorted(marks, key=lambda mark: mark.x):
        at, width = _x(x, mark.x), SMALL * len(mark.name)
        yield f"<g {coloured(mark.colour)}>"
        place = f'x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"'
        yield f'<line class="mark" {place}><title>{escape(mark.name)}</title></line>'
        start = at + 3 if at + 3 + width < WIDTH else at - 3 - width
        if start > free:
            yield f'<text class="mark-name" x="{start:.1f}" y="{TOP + 7}">{escape(mark.name)}</text>'
            free = start + width + 2
        yield "</g>"


def _line(x: Axis, y: Axis, line: Line) -> Iterator[str]:
    kept = thinned(line.y)
    points = [(_x(x, line.x[i]), _y(y, line.y[i])) for i in kept]
    runs = [list(some) for known, some in groupby(points, key=lambda point: all(map(math.isfinite, point))) if known]
    yield f"<g {coloured(line.colour)}><title>{escape(line.words)}</title>"
    if line.low is not None and line.high is not None:
        yield from _spread(x, y, line, kept)
    dash = " dashed" if line.dashed else ""
    for run in runs:
        if len(run) > 1:
            yield f'<path class="line{dash}" d="M{" ".join(f"{across:g},{down:g}" for across, down in run)}"/>'
        elif not line.dots:  # alone between gaps: a line of it would not be seen
            yield f'<circle class="dot" cx="{run[0][0]:g}" cy="{run[0][1]:g}" r="2"/>'
    if line.dots or len(kept) <= HOVERED:
        size = "dot" if line.dots else "hover"
        for number, (across, down) in zip(kept, points, strict=True):
            if math.isfinite(across) and math.isfinite(down):
                said = f"{line.name}: {line.y[number]:.4g} at {line.x[number]:g}"
                yield f'<circle class="{size}" cx="{across:g}" cy="{down:g}" r="3"><title>{escape(said)}</title></circle>'
    yield "</g>"


def _spread(x: Axis, y: Axis, line: Line, kept: list[int]) -> Iterator[str]:
    """Error bars at dots, else a band."""
    ends = [(_x(x, line.x[i]), _y(y, line.low[i]), _y(y, line.high[i])) for i in kept]
    known = [end for end in ends if all(map(math.isfinite, end))]
    if line.dots:
        for across, low, high in known:
            yield f'<path class="error" d="M{across - 3:g},{low:g}h6M{across - 3:g},{high:g}h6M{across:g},{low:g}V{high:g}"/>'
    elif known:
        there = " ".join(f"{across:g},{low:g}" for across, low, _ in known)
        back = " ".join(f"{across:g},{high:g}" for across, _, high in reversed(known))
        yield f'<path class="band" d="M{there} {back}z"/>'


def _histogram(histogram: Histogram) -> Iterator[str]:
    edges, several = histogram.edges, len(histogram.series) > 1
    x = x_axis([*edges, *(mark.x for mark in histogram.limits)])
    heights = [value for series in histogram.series for value in series.values]
    y = axis_of(heights if histogram.log_y else [0.0, *heights], log=histogram.log_y)
    yield from _frame(x, y, histogram.x_label, histogram.y_label)
    for series in histogram.series:
        yield f"<g {coloured(series.colour, series.tint)}><title>{escape(series.name)}</title>"
        yield from (_outline(x, y, edges, series) if several else _columns(x, y, edges, series, histogram))
        yield "</g>"
    yield from _marks(x, histogram.limits)


def _columns(x: Axis, y: Axis, edges: Numbers, series: Series, histogram: Histogram) -> Iterator[str]:
    floor = _y(y, y.low)
    for low, high, value in zip(edges, edges[1:], series.values, strict=False):
        if not (math.isfinite(value) and value > 0):
            continue
        top = _y(y, value)
        gap = 1 if _x(x, high) - _x(x, low) > 3 else 0
        box = f'x="{_x(x, low)}" y="{top}" width="{max(_x(x, high) - _x(x, low) - gap, 0.5):.1f}" height="{floor - top:.1f}"'
        said = f"{written(low)} to {written(high)} {histogram.x_label}: {written(value)} {histogram.y_label}"
        yield f'<rect class="bar" {box}><title>{escape(said)}</title></rect>'


def _outline(x: Axis, y: Axis, edges: Numbers, series: Series) -> Iterator[str]:
    floor = _y(y, y.low)
    drawn = []
    for low, high, value in zip(edges, edges[1:], series.values, strict=False):
        top = _y(y, value) if math.isfinite(value) and (value > 0 or not y.log) else floor
        drawn += [f"{_x(x, low):g},{top:g}", f"{_x(x, high):g},{top:g}"]
    path = f"M{_x(x, edges[0]):g},{floor:g} {' '.join(drawn)} {_x(x, edges[-1]):g},{floor:g}"
    yield f'<path class="band" d="{path}z"/><path class="line" d="{path}"/>'


def _reach(bars: Bars) -> tuple[float, float]:
    """The least and the largest number that has to be drawn, error bars and 0 among them."""
    if bars.stacked:
        sums = [sum(filter(math.isfinite, values)) for values in zip(*(series.values for series in bars.series), strict=True)]
        return 0.0, max([*sums, 0.0]) or 1.0
    ends = [0.0]
    for series in bars.series:
        for number, value in enumerate(series.values):
            half = _half(series, number)
            ends += [value - half, value + half] if math.isfinite(value) else []
    low, high = min(ends), max(ends)
    return (low, high) if high > low else (0.0, 1.0)


def _half(series: Series, number: int) -> float:
    """Of an error bar; 0 where there is none."""
    error = math.nan if series.errors is None else series.errors[number]
    return error if math.isfinite(error) else 0.0


def _height(bars: Bars) -> int:
    of_one = 1 if bars.stacked else len(bars.series)
    return TOP + len(bars.names) * (ROW + of_one * (BAR + 2) + 4) + 6


def _bars(bars: Bars) -> Iterator[str]:
    """Lying, each under its name: names of any length have room, on a phone too."""
    low, high = _reach(bars)
    room = 4 if bars.stacked else 64  # for the number behind a bar
    scale = (WIDTH - 4 - room) / (high - low)
    zero = 2 - low * scale
    yield f'<text class="label" x="2" y="11">{escape(bars.y_label)}</text>'
    top = float(TOP)
    for number, name in enumerate(bars.names):
        yield f'<text class="name" x="2" y="{top + ROW - 5}">{escape(name)}</text>'
        top, begin = top + ROW, zero
        for series in bars.series:
            value, half = series.values[number], _half(series, number)
            length = value * scale if math.isfinite(value) else 0.0
            said = f"{name}, {series.name}: {value:.4g}{f' ± {half:.3g}' if half else ''} {bars.y_label}"
            box = f'x="{min(begin, begin + length):.1f}" y="{top}" width="{abs(length):.1f}" height="{BAR}"'
            yield f'<g {coloured(series.colour, series.tint)}><rect class="bar" {box}><title>{escape(said)}</title></rect>'
            if half:
                left, right = (begin + length + sign * half * scale for sign in (-1, 1))
                yield f'<path class="whisker" d="M{left:.1f},{top + BAR / 2}H{right:.1f}v-3v6"/>'
            yield "</g>"
            if bars.stacked:
                begin += length
            else:
                past = max(zero, zero + length + half * scale) + 5
                yield f'<text x="{past:.1f}" y="{top + BAR - 1}">{"–" if math.isnan(value) else written(value)}</text>'
                top += BAR + 2
        top += (BAR + 2 if bars.stacked else 0) + 4


__all__ = ["HEIGHT", "WIDTH", "coloured", "drawing"]
