"""Figures as pure data: what is shown, in which units, and the same in words. `svg`, `html` and `png` draw them.

A number that is not known is nan: a gap. `colour` counts through `picture.LINES`; None is grey.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Numbers = Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Line:
    """y over x.

    Raises:
        ValueError: lengths that differ.
    """

    name: str
    x: Numbers  # [n]
    y: Numbers  # [n]
    low: Numbers | None = None  # [n] ends of a band, or of error bars where there are dots
    high: Numbers | None = None  # [n]
    colour: int | None = 0
    dashed: bool = False
    dots: bool = False  # one at each point

    def __post_init__(self) -> None:
        for values in (self.y, self.low, self.high):
            if values is not None and len(values) != len(self.x):
                raise ValueError(f"{self.name}: {len(self.x)} x, and {len(values)} values")

    @property
    def words(self) -> str:
        known = [(x, y) for x, y in zip(self.x, self.y, strict=True) if math.isfinite(y)]
        if not known:
            return f"{self.name}: nothing known"
        (first, begin), (last, end) = known[0], known[-1]
        if len(known) == 1:
            return f"{self.name}: {begin:.4g} at {first:g}"
        least, most = min(known, key=lambda point: point[1]), max(known, key=lambda point: point[1])
        spread = f"lowest {least[1]:.4g} at {least[0]:g}, highest {most[1]:.4g} at {most[0]:g}"
        return f"{self.name}: {begin:.4g} at {first:g}, {end:.4g} at {last:g}, {spread}"


@dataclass(frozen=True)
class Mark:
    """A place on the x axis: the end of an epoch, a limit."""

    x: float
    name: str
    colour: int | None = None


@dataclass(frozen=True)
class Span:
    """A stretch of the x axis, shaded: the warm-up."""

    low: float
    high: float
    name: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines over one x axis."""

    name: str  # of files and anchors
    title: str
    x_label: str  # with its unit
    y_label: str  # with its unit
    lines: Sequence[Line]
    marks: Sequence[Mark] = ()
    spans: Sequence[Span] = ()
    log_x: bool = False
    log_y: bool = False  # values of 0 and below are gaps
    note: str = ""  # how to read it

    @property
    def words(self) -> str:
        marked = [f"{mark.name} at {mark.x:g}" for mark in self.marks]
        shaded = [f"{span.name} from {span.low:g} to {span.high:g}" for span in self.spans]
        over = f"{self.y_label} over {self.x_label}"
        return ". ".join([over, *(line.words for line in self.lines), *(["; ".join(marked + shaded)] if marked + shaded else [])])


@dataclass(frozen=True, kw_only=True)
class Switched:
    """The same over several x axes, one of which is shown at a time."""

    charts: Mapping[str, Chart]  # what is on the x axis -> the chart

    @property
    def name(self) -> str:
        return next(iter(self.charts.values())).name

    @property
    def title(self) -> str:
        return next(iter(self.charts.values())).title


@dataclass(frozen=True, kw_only=True)
class Series:
    """The heights of bars."""

    name: str
    values: Numbers
    errors: Numbers | None = None  # half of an error bar
    colour: int | None = 0
    tint: str | None = None  # a colour of its own, as #rrggbb

    def words(self, of: Sequence[str], most: int = 12) -> str:
        known = [(name, value) for name, value in zip(of, self.values, strict=True) if math.isfinite(value)]
        shown = sorted(known, key=lambda pair: -pair[1])[:most] if len(known) > most else known
        left_out = f", and {len(known) - most} smaller" if len(known) > most else ""
        return f"{self.name}: " + (", ".join(f"{name} {value:.4g}" for name, value in shown) or "nothing known") + left_out


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Columns between edges. Several series lie over one another, as outlines.

    Raises:
        ValueError: a series that has not one value for each interval.
    """

    name: str
    title: str
    x_label: str  # with its unit
    y_label: str
    edges: Numbers  # [n + 1], ascending
    series: Sequence[Series]  # of [n] values each
    limits: Sequence[Mark] = ()
    log_y: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        for series in self.series:
            if len(series.values) != len(self.edges) - 1:
                raise ValueError(f"{series.name}: {len(series.values)} values between {len(self.edges)} edges")

    @property
    def words(self) -> str:
        intervals = [f"{low:.4g} to {high:.4g}:" for low, high in pairwise(self.edges)]
        said = [series.words(intervals) for series in self.series] + [f"{mark.name} at {mark.x:g}" for mark in self.limits]
        return ". ".join([f"{self.y_label} over {self.x_label}", *said])


@dataclass(frozen=True, kw_only=True)
class Bars:
    """A bar for each of some names; those of several series side by side, or one on top of the other.

    Raises:
        ValueError: a series that has not one value for each name; stacked, one with a value below 0.
    """

    name: str
    title: str
    x_label: str  # with its unit, or what the names are
    y_label: str
    names: Sequence[str]
    series: Sequence[Series]
    stacked: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        for series in self.series:
            if len(series.values) != len(self.names):
                raise ValueError(f"{series.name}: {len(series.values)} values of {len(self.names)} names")
            if self.stacked and any(value < 0 for value in series.values):
                raise ValueError(f"{series.name}: {min(series.values)} cannot be put on top of another bar")

    @property
    def words(self) -> str:
        return ". ".join([f"{self.y_label} by {self.x_label}", *(series.words(self.names) for series in self.series)])


@dataclass(frozen=True)
class Token:
    """A piece of a text, or a word of a cloud."""

    text: str
    value: float
    hover: str = ""  # more about it


@dataclass(frozen=True, kw_only=True)
class Heat:
    """A text whose tokens are coloured by a number: from `low` over 0 to `high`."""

    name: str
    title: str
    unit: str  # what the numbers are, with their unit
    tokens: Sequence[Token]
    low: float
    high: float
    note: str = ""

    @property
    def words(self) -> str:
        known = [token for token in self.tokens if math.isfinite(token.value)]
        if not known:
            return f"{self.unit} of {len(self.tokens)} tokens: nothing known"
        least, most = min(known, key=lambda token: token.value), max(known, key=lambda token: token.value)
        mean = sum(token.value for token in known) / len(known)
        return (
            f"{self.unit} of {len(known)} tokens: mean {mean:.4g}, lowest {least.value:.4g} of {least.text!r}, "
            f"highest {most.value:.4g} of {most.text!r}"
        )


@dataclass(frozen=True, kw_only=True)
class Cloud:
    """Words in sizes by their value; values of 0 and below are left out."""

    name: str
    title: str
    unit: str  # what the values are, with their unit
    tokens: Sequence[Token]
    note: str = ""

    @property
    def words(self) -> str:
        largest = sorted(self.tokens, key=lambda token: -token.value)[:10]
        return f"{self.unit}: " + (", ".join(f"{token.text!r} {token.value:.4g}" for token in largest) or "no words")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table; a cell is text.

    Raises:
        ValueError: a row that has not one cell for each heading.
    """

    name: str
    title: str
    heading: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[int] = frozenset()  # columns that hold numbers, which are set to the right
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.heading):
                raise ValueError(f"{self.title}: {len(row)} cells under {len(self.heading)} headings")

    @property
    def words(self) -> str:
        return f"{len(self.rows)} rows of {', '.join(self.heading)}"


Figure = Chart | Switched | Histogram | Bars | Heat | Cloud | Grid

__all__ = ["Bars", "Chart", "Cloud", "Figure", "Grid", "Heat", "Histogram", "Line", "Mark", "Series", "Span", "Switched", "Token"]
