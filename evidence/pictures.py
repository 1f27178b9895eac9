"""The kinds of figures that several claims share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evidence.interval import Interval, interval
from evidence.results import Number, Results, final, mean
from megapsft.report.figure import Bars, Chart, Line, Series

OVER_SEEDS = "Mean over seeds, with its 95 % interval by Student's t."
SHARE = "accuracy (share of problems)"


def curves(results: Results, methods: Mapping[str, str], curve: str, *, name: str, title: str, y_label: str) -> Chart:
    """A curve of the steps of some methods, over samples.

    Args:
        methods: legend -> name of the method.
        curve: one of `measured.CURVES`.
    """
    lines = []
    for colour, (legend, method) in enumerate(methods.items()):
        outcome = results[method]
        runs = [run.curves[curve] for run in outcome.runs.values()]
        each = outcome.samples / len(runs[0])
        lines.append(_line(legend, [each * (step + 1) for step in range(len(runs[0]))], runs, colour))
    return Chart(name=name, title=title, x_label="samples", y_label=y_label, lines=lines, note=OVER_SEEDS)


def accuracies(results: Results, methods: Mapping[str, str], family: str, *, name: str, title: str) -> Chart:
    """The accuracy of some methods at the start, in the middle and at the end, over samples."""
    lines = []
    for colour, (legend, method) in enumerate(methods.items()):
        outcome = results[method]
        after = next(iter(outcome.runs.values())).evaluated_after
        x = [outcome.samples * step / after[-1] for step in after]
        lines.append(_line(legend, x, [run.accuracy[family] for run in outcome.runs.values()], colour, dots=True))
    return Chart(name=name, title=title, x_label="samples", y_label=SHARE, lines=lines, note=OVER_SEEDS)


def in_and_out(results: Results, methods: Mapping[str, str], *, name: str, title: str) -> Bars:
    """The final accuracies of some methods, in and out of the domain."""
    series = [
        _series(label, [mean(results, method, final(family)) for method in methods.values()], colour)
        for colour, (label, family) in enumerate((("in-domain", "in"), ("out of domain", "out")))
    ]
    return Bars(name=name, title=title, x_label="method", y_label=SHARE, names=list(methods), series=series, note=OVER_SEEDS)


def bars(results: Results, methods: Mapping[str, str], number: Number, *, name: str, title: str, y_label: str) -> Bars:
    """One number of some methods, 0 or more."""
    series = [_series(y_label, [mean(results, method, number) for method in methods.values()], 0)]
    return Bars(name=name, title=title, x_label="method", y_label=y_label, names=list(methods), series=series, note=OVER_SEEDS)


def _line(name: str, x: Sequence[float], runs: Sequence[Sequence[float]], colour: int, dots: bool = False) -> Line:
    found = [interval(at) for at in zip(*runs, strict=True)]
    y, low, high = ([getattr(one, key) for one in found] for key in ("mean", "low", "high"))
    return Line(name=name, x=x, y=y, low=low, high=high, colour=colour, dots=dots)


def _series(name: str, found: Sequence[Interval], colour: int) -> Series:
    errors = [one.half for one in found]
    return Series(name=name, values=[one.mean for one in found], errors=errors, colour=colour)
