"""A part of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megapsft.report.figure import Figure
from megapsft.report.lines import Curve, switched
from megapsft.report.run import Run


@dataclass(frozen=True, kw_only=True)
class Section:
    """Figures under a heading."""

    name: str
    figures: Sequence[Figure]
    note: str = ""  # what is to be known before they are read


def of_curves(name: str, curves: Sequence[Curve], runs: Sequence[Run], note: str = "") -> Section | None:
    """The curves that any run recorded; None where that is none."""
    figures = [figure for curve in curves if (figure := switched(curve, runs)) is not None]
    return Section(name=name, figures=figures, note=note) if figures else None


__all__ = ["Section", "of_curves"]
