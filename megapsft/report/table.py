"""A run in a table: one row a phase."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from rich import box
from rich.table import Table

from megapsft.errors import Refused
from megapsft.metrics.records import read_records
from megapsft.report.phases import Phase, phases

HEADING = ("phase", "updates", "loss", "nll", "entropy", "clipped")


def phase_table(path: str | Path) -> Table:
    """First and last loss, nll and entropy of each phase, how much was clipped and how many updates were skipped.

    Args:
        path: metrics.jsonl of a run.

    Raises:
        Refused: no such file, or no records in it.
    """
    records = read_records(path)
    if not records:
        raise Refused(str(path), "has no records", "wait for the first update of the run")
    table = Table(title=str(path), box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column(HEADING[0], no_wrap=True)
    for heading in HEADING[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in phase_rows(phases(records)):
        table.add_row(*row)
    return table


def phase_rows(cut: Sequence[Phase]) -> list[list[str]]:
    """The cells under HEADING, a row for each phase."""
    rows = []
    skipped_before = 0.0  # the record counts skipped updates from the start of the run
    for phase in cut:
        skipped = max(phase.values("train/skipped_updates"), default=skipped_before)
        updates = str(len(phase.records)) + (f" ({skipped - skipped_before:.0f} skipped)" if skipped > skipped_before else "")
        numbers = [first_last(phase, key) for key in ("train/loss", "objective/nll", "policy/entropy")]
        rows.append([phase.title, updates, *numbers, over(fmean, phase, "objective/clip_fraction")])
        skipped_before = skipped
    return rows


def first_last(phase: Phase, key: str) -> str:
    values = phase.values(key)
    return f"{values[0]:.3f}→{values[-1]:.3f}" if values else "–"


def over(reduce: Callable[[list[float]], float], phase: Phase, key: str) -> str:
    values = phase.values(key)
    return f"{reduce(values):.3f}" if values else "–"
