"""What each stage of a pipeline made of the model: a table on the terminal, as Markdown and JSON, and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement

from megapsft.metrics.shown import Table
from megapsft.output.whole import write_whole
from megapsft.report.figure import Bars, Series
from megapsft.report.png import write_png
from megapsft.report.table import percent, to_rich

NAME = "hand-off"

Row = Mapping[str, Any]  # of one stage and one benchmark, as megapsft/pipeline/measure.py says


def write_hand_off(rows: Sequence[Row], folder: Path) -> None:
    """hand-off.json, .md and .png in the folder: each the old file or the new one, never half of one."""
    write_whole(folder / f"{NAME}.json", json.dumps(list(rows), indent=1) + "\n")
    write_whole(folder / f"{NAME}.md", hand_off_of(rows).markdown())
    draw_hand_off(rows, folder / f"{NAME}.png")


def show_hand_off(rows: Sequence[Row]) -> None:
    """Print the table, as wide as it is: numbers are never cut."""
    table, console = to_rich(hand_off_of(rows)), Console()
    width = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    Console(width=max(console.width, width)).print(table)


def hand_off_of(rows: Sequence[Row]) -> Table:
    """A line for each row: percent with standard errors, tokens, nats a token."""
    ks = of_passes(rows)
    heading = ["stage", "benchmark", "problems", "n", "avg@n", *ks, "length", "entropy", "KL (k1)", "KL (k3)"]
    lines = [
        [
            row["stage"],
            row["benchmark"],
            str(row["problems"]),
            str(row["n"]),
            *(percent(row, key) for key in ("avg", *ks)),
            f"{row['length']:.1f}",
            *(f"{row[key]:.4f}" for key in ("entropy", "kl_k1", "kl_k3")),
        ]
        for row in rows
    ]
    return Table(NAME, heading, lines, texts=2)


def of_passes(rows: Sequence[Row]) -> list[str]:
    """The keys of pass@k, by k."""
    found = {key for row in rows for key in row if key.startswith("pass@") and not key.endswith("_se")}
    return sorted(found, key=lambda key: int(key[5:]))


def bars(rows: Sequence[Row], pipeline: str = "") -> list[Bars]:
    """Accuracy, pass@k of the largest k, length, entropy and both estimates of the KL after each stage, a bar for each benchmark.

    Args:
        rows: with standard errors, where there are any.
        pipeline: its name, where figures of others stand beside these.
    """
    titles = {"avg": ("Accuracy, avg@n", "% of responses", 100.0)}
    titles |= {key: (key, "% of problems", 100.0) for key in of_passes(rows)[-1:]}
    titles |= {"length": ("Length of responses", "tokens", 1.0), "entropy": ("Entropy", "nats a token", 1.0)}
    titles |= {f"kl_{kind}": (f"KL from the start, {kind}", "nats a token", 1.0) for kind in ("k1", "k3")}
    stages, benchmarks = (list(dict.fromkeys(row[key] for row in rows)) for key in ("stage", "benchmark"))
    found = []
    for key, (title, unit, size) in titles.items():
        errors = any(row.get(f"{key}_se") is not None for row in rows)
        series = []
        for colour, benchmark in enumerate(benchmarks):
            own = {row["stage"]: row for row in rows if row["benchmark"] == benchmark}
            values, halves = (_of_stages(own, stages, of, size) for of in (key, f"{key}_se"))
            series.append(Series(name=benchmark, values=values, errors=halves if errors else None, colour=colour))
        name, title = (f"{NAME}-{pipeline}-{key}", f"{pipeline}: {title}") if pipeline else (f"{NAME}-{key}", title)
        note = "Error bars are one standard error." if errors else ""
        found.append(Bars(name=name, title=title, x_label="stage", y_label=unit, names=stages, series=series, note=note))
    return found


def _of_stages(own: Mapping[str, Row], stages: Sequence[str], key: str, size: float) -> list[float]:
    """nan where a stage has no such number."""
    values = [own.get(stage, {}).get(key) for stage in stages]
    return [math.nan if value is None else size * value for value in values]


def draw_hand_off(rows: Sequence[Row], out_png: Path) -> None:
    """Draw the bars.

    Args:
        out_png: the file to write, a PNG whatever its suffix.
    """
    write_png(bars(rows), out_png)
