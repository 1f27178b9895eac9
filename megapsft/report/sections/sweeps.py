"""How a run scales over nodes and splits."""

from __future__ import annotations

from megapsft.report.figure import Figure, Grid
from megapsft.report.folders import Shown, Sweep
from megapsft.report.scaling import WORDS, cells, charts
from megapsft.report.section import Section


def section(shown: Shown) -> Section | None:
    figures = [figure for sweep in shown.sweeps for figure in _figures(sweep)]
    return Section(name="Scaling", figures=figures) if figures else None


def _figures(sweep: Sweep) -> list[Figure]:
    heading, *rows = cells(sweep.rows)
    numbers = frozenset(number for number, name in enumerate(heading) if name not in WORDS)
    table = Grid(
        name=f"scaling-{sweep.name}", title=f"{sweep.name}: its points", heading=heading, rows=rows, numbers=numbers,
        note=" ".join(f"{note}." for note in sweep.notes),
    )  # fmt: skip
    return [table, *(charts(sweep.rows, sweep.name) if any(row["measured"] for row in sweep.rows) else ())]


__all__ = ["section"]
