"""A comparison of models: a table, JSON, and a page of HTML that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from megapsft.errors import Refused
from megapsft.output.whole import write_whole
from megapsft.report.dynamics import distance_grid, dynamics
from megapsft.report.figure import Figure, Grid
from megapsft.report.html import figure
from megapsft.report.probabilities import probability_histogram
from megapsft.report.shifts import heat, last_of_each, shift_histogram, words
from megapsft.report.style import document, section
from megapsft.train.comparison import Comparison, Seen, from_json, to_json

THRESHOLDS = (0.01, 0.1, 0.5)  # of |shift|
RESPONSES = 3  # on the page, of each name
HEADING = (
    "model",
    "folder",
    "nll",
    "entropy",
    "likeliest",
    "KL(model‖base)",
    "KL(base‖model)",
    *(f"|shift|>{t:g}" for t in THRESHOLDS),
)
NOTE = (
    "Means over the tokens of the responses; nll, entropy and KL are in nats, KL over the full vocabulary. likeliest: share of "
    "tokens that no other word beats. shift: p model − p base."
)


def summary(comparison: Comparison) -> list[list[str]]:
    """The cells under HEADING, a row for each model."""
    return [_cells(comparison, seen) for seen in (comparison.base, *comparison.references, *comparison.tuned)]


def _cells(comparison: Comparison, seen: Seen) -> list[str]:
    cells = [
        seen.name,
        Path(seen.path).name,
        f"{-seen.logprobs.mean():.4f}",
        f"{seen.entropy.mean():.4f}",
        f"{(seen.ranks == 1).mean():.1%}",
    ]
    if seen is comparison.base:
        return cells + ["–"] * (2 + len(THRESHOLDS))
    away = np.abs(comparison.shift(seen))
    shares = [f"{(away > threshold).mean():.1%}" for threshold in THRESHOLDS]
    return [*cells, f"{seen.kl.mean():.5f}", f"{seen.kl_of_base.mean():.5f}", *shares]


def show_comparison(comparison: Comparison) -> None:
    """Print the table of models, and for each name the words that gained and lost most."""
    console = Console()
    responses, tokens = len(comparison.lengths), len(comparison.token_ids)
    title = f"{tokens:,} tokens of {responses:,} responses of {comparison.data}"
    console.print(_table(title, HEADING, summary(comparison), NOTE))
    grids = [words(comparison, seen, "words") for seen in last_of_each(comparison)]
    if comparison.references:
        grids.append(distance_grid(comparison))
    for grid in grids:
        console.print(_table(grid.title, grid.heading, grid.rows, grid.note))


def _table(title: str, heading: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> Table:
    table = Table(title=escape_markup(title), box=box.SIMPLE, padding=(0, 1, 0, 0), caption=note, caption_justify="left")
    for name in heading:
        table.add_column(escape_markup(name), justify="left" if name in ("model", "folder", "token", "") else "right")
    for row in rows:
        table.add_row(*map(escape_markup, row))
    return table


def escape_markup(text: str) -> str:
    """Rich would read [brackets]."""
    return text.replace("[", r"\[")


def figures(comparison: Comparison) -> dict[str, list[Figure]]:
    """Name of a section -> its figures."""
    last = last_of_each(comparison)
    seen = {one.name: one.logprobs.tolist() for one in (comparison.base, *last)}
    title = "Probabilities of the tokens of the responses"
    numbers = frozenset(range(2, len(HEADING)))
    models = Grid(name="models", title="Models", heading=HEADING, rows=summary(comparison), numbers=numbers, note=NOTE)
    responses = [
        heat(comparison, one, number, f"heat-{at}-{number}")
        for number in range(min(RESPONSES, len(comparison.lengths)))
        for at, one in enumerate(last)
    ]
    found: dict[str, list[Figure]] = {
        "Models": [models],
        "Probabilities": [probability_histogram(seen, "probabilities", title), shift_histogram(comparison)],
        "Words": [words(comparison, one, f"words-{at}") for at, one in enumerate(last)],
        "Responses": list(responses),
    }
    if comparison.references or len(comparison.tuned) > 1:
        found["Learning dynamics"] = [*dynamics(comparison), distance_grid(comparison)]
    return found


def write_page(comparison: Comparison, path: Path) -> None:
    """The page, the old file or the new one; folders are made."""
    title = f"{', '.join(one.name for one in last_of_each(comparison))} beside {comparison.base.name}"
    said = f"{len(comparison.token_ids):,} tokens of {len(comparison.lengths):,} responses of {comparison.data}"
    body = "".join(
        section(name, f'<div class="figures">{"".join(map(figure, shown))}</div>') for name, shown in figures(comparison).items()
    )
    header = f"<header><h1>{escape(title)}</h1><p class=soft>{escape(said)}</p></header>"
    write_whole(path, document(title, f"{header}<main>{body}</main>"))


def write_json(comparison: Comparison, path: Path) -> None:
    """Everything that was measured, to be read by `read_json`; folders are made."""
    write_whole(path, json.dumps(to_json(comparison), ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Comparison:
    """As `write_json` wrote it.

    Raises:
        Refused: it is not that.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Refused(str(path), f"is not JSON ({error})", "write it again: megapsft compare --json") from None
    return from_json(content if isinstance(content, dict) else {}, str(path))


__all__ = ["figures", "read_json", "show_comparison", "summary", "write_json", "write_page"]
