"""Tables: of the phases of a run, and how any is printed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import rich.table
from rich import box

from megapsft.errors import Refused
from megapsft.metrics.records import read_records
from megapsft.metrics.shown import Table
from megapsft.report.phases import Phase, phases

HEADING = ("phase", "updates", "loss", "nll", "entropy", "clipped")


def phase_table(path: str | Path) -> rich.table.Table:
    """`phases_of` the metrics.jsonl of a run, for the terminal.

    Raises:
        Refused: no such file, or no records in it.
    """
    records = read_records(path)
    if not records:
        raise Refused(str(path), "has no records", "wait for the first update of the run")
    return to_rich(phases_of(records), title=str(path))


def phases_of(records: Sequence[dict[str, Any]]) -> Table:
    """First and last loss, nll and entropy of each phase, how much was clipped and how many updates were skipped."""
    return Table("phases", HEADING, phase_rows(phases(records)))


def to_rich(table: Table, title: str | None = None, caption: str | None = None) -> rich.table.Table:
    """For the terminal: numbers to the right, and never cut."""
    found = rich.table.Table(title=title, caption=caption, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for number, name in enumerate(table.heading):
        found.add_column(name, justify="left" if number < table.texts else "right", no_wrap=True)
    for row in table.rows:
        found.add_row(*row)
    return found


def phase_rows(cut: Sequence[Phase]) -> list[tuple[str, ...]]:
    """The cells under HEADING, a row for each phase."""
    rows = []
    skipped_before = 0.0  # the record counts skipped updates from the start of the run
    for phase in cut:
        skipped = max(phase.values("train/skipped_updates"), default=skipped_before)
        updates = str(len(phase.records)) + (f" ({skipped - skipped_before:.0f} skipped)" if skipped > skipped_before else "")
        numbers = [first_last(phase, key) for key in ("train/loss", "objective/nll", "policy/entropy")]
        rows.append((phase.title, updates, *numbers, over(fmean, phase, "objective/clip_fraction")))
        skipped_before = skipped
    return rows


def first_last(phase: Phase, key: str) -> str:
    values = phase.values(key)
    return f"{values[0]:.3f}→{values[-1]:.3f}" if values else "–"


def over(reduce: Callable[[list[float]], float], phase: Phase, key: str) -> str:
    values = phase.values(key)
    return f"{reduce(values):.3f}" if values else "–"


def percent(row: Mapping[str, Any], key: str) -> str:
    """A share, and its standard error under `<key>_se` where that is known."""
    if row.get(key) is None:
        return "–"
    error = row.get(f"{key}_se")
    return f"{100 * row[key]:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")
