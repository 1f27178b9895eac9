"""What each stage of a pipeline made of the model: a table on the terminal, as Markdown and JSON, and a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement

from megapsft.metrics.shown import Table
from megapsft.report.picture import LINES
from megapsft.report.table import percent, to_rich

NAME = "hand-off"

Row = Mapping[str, Any]  # of one stage and one benchmark, as megapsft/pipeline/measure.py says


def write_hand_off(rows: Sequence[Row], folder: Path) -> None:
    """hand-off.json, .md and .png in the folder: each the old file or the new one, never half of one."""
    folder.mkdir(parents=True, exist_ok=True)
    json_file, markdown, picture = (folder / f"{NAME}.{kind}" for kind in ("json", "md", "png"))
    beside = folder / f".{NAME}.tmp"
    for path, text in ((json_file, json.dumps(list(rows), indent=1) + "\n"), (markdown, hand_off_of(rows).markdown())):
        beside.write_text(text)
        os.replace(beside, path)
    draw_hand_off(rows, beside)
    os.replace(beside, picture)


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


def draw_hand_off(rows: Sequence[Row], out_png: Path) -> None:
    """Draw accuracy, pass@k of the largest k, length, entropy and both estimates of the KL over the stages.

    Args:
        rows: a line for each benchmark; standard errors are bars.
        out_png: the file to write, a PNG whatever its suffix.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    titles = {"avg": "Accuracy, avg@n", "length": "Length (tokens)", "entropy": "Entropy (nats a token)"}
    titles |= {"kl_k1": "KL from the start, k1 (nats a token)", "kl_k3": "KL from the start, k3 (nats a token)"}
    if ks := of_passes(rows):
        titles = {"avg": titles["avg"], ks[-1]: ks[-1], **titles}
    figure = Figure(figsize=(13, 7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(2, 3).flat)
    benchmarks = list(dict.fromkeys(row["benchmark"] for row in rows))
    for axes, (key, title) in zip(grid, titles.items(), strict=False):
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        for number, benchmark in enumerate(benchmarks):
            own = [row for row in rows if row["benchmark"] == benchmark and row.get(key) is not None]
            errors = [row.get(f"{key}_se") or 0.0 for row in own]
            style = {"color": LINES[number % len(LINES)], "marker": "o", "linewidth": 1.6, "capsize": 3}
            axes.errorbar([row["stage"] for row in own], [row[key] for row in own], yerr=errors, label=benchmark, **style)
        axes.tick_params(labelsize=9)
    for axes in grid[len(titles) :]:
        axes.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 6), frameon=False, fontsize=11)
    figure.savefig(out_png, dpi=130, format="png")
