"""How a run scales over nodes and splits: a table on the terminal, as Markdown and JSON, and a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from megapsft.report.picture import LINES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPORT, PICTURE = "report", "scaling.png"
MARKERS = "osD^vP"
GIB = 2**30
WORDS = ("split", "state", "why")  # columns without numbers
PANELS = (  # key, title, unit, how much of the value it is, logarithmic
    ("tokens_per_second", "Tokens/s, all ranks", "tokens/s", 1, True),
    ("tokens_per_second_per_rank", "Tokens/s of a rank", "tokens/s", 1, False),
    ("efficiency", "Scaling efficiency", "%", 0.01, False),
    ("seconds_per_step", "Time of a step", "s", 1, True),
    ("memory_bytes", "Memory of the fullest rank", "GiB", GIB, False),
)

Row = Mapping[str, Any]  # of one point, as megapsft/cluster/sweep/measure.py says


def show_scaling(rows: Sequence[Row]) -> None:
    """Print the table, as wide as its numbers are; only reasons are folded."""
    heading, *lines = cells(rows)
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in heading:
        folded = name == "why"
        side = "left" if name in WORDS else "right"
        table.add_column(name, justify=side, no_wrap=not folded, overflow="fold", width=40 if folded else None)
    for line in lines:
        table.add_row(*line)
    console = Console()
    width = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    Console(width=max(console.width, width)).print(table)


def write_scaling(rows: Sequence[Row], notes: Sequence[str], folder: Path) -> list[Path]:
    """report.json, report.md and, where anything was measured, scaling.png in the folder: each the old file or the new one.

    Args:
        notes: what the figures rest on.
    """
    beside = folder / f".{REPORT}.tmp"
    texts = {
        folder / f"{REPORT}.json": json.dumps({"notes": list(notes), "points": list(rows)}, indent=1) + "\n",
        folder / f"{REPORT}.md": to_markdown(rows, notes),
    }
    found = list(texts)
    for path, text in texts.items():
        beside.write_text(text)
        os.replace(beside, path)
    if any(row["measured"] for row in rows):
        draw_scaling(rows, beside)
        os.replace(beside, folder / PICTURE)
        found.append(folder / PICTURE)
    return found


def to_markdown(rows: Sequence[Row], notes: Sequence[str]) -> str:
    heading, *lines = cells(rows)
    rule = ["---" if name in WORDS else "---:" for name in heading]
    drawn = any(row["measured"] for row in rows)
    picture = f"\n![tokens/s, efficiency, time and memory over nodes]({PICTURE})\n" if drawn else ""
    table = "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in (heading, rule, *lines))
    return f"# Scaling\n\n{table}{picture}\n" + "".join(f"- {note}\n" for note in notes)


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The heading, and a line for each row; what was planned only where anything was."""
    planned, split = any(row["planned"] for row in rows), any(row["split"] for row in rows)
    reasons = any(row["why"] for row in rows)
    heading = ["nodes", "ranks", *(["split"] if split else []), "batch", "state", "s a step", "tokens/s", "a rank", "efficiency"]
    of_plan = ["planned s", "planned tokens/s", "measured of it", "planned GiB"]
    heading += ["GiB", *(of_plan if planned else []), *(["why"] if reasons else [])]
    return [heading] + [
        [
            str(row["nodes"]),
            str(row["ranks"]),
            *([row["split"]] if split else []),
            str(row["batch_size"]),
            row["state"],
            _number(row, "measured", "seconds_per_step", ".2f"),
            _number(row, "measured", "tokens_per_second", ",.0f"),
            _number(row, "measured", "tokens_per_second_per_rank", ",.0f"),
            _number(row, "measured", "efficiency", ".0%"),
            _number(row, "measured", "memory_bytes", ".2f", GIB),
            *(_planned(row) if planned else []),
            *([row["why"]] if reasons else []),
        ]
        for row in rows
    ]


def _planned(row: Row) -> list[str]:
    known = row["measured"] and row["planned"]
    part = f"{row['measured']['tokens_per_second'] / row['planned']['tokens_per_second']:.0%}" if known else "–"
    seconds, speed = _number(row, "planned", "seconds_per_step", ".2f"), _number(row, "planned", "tokens_per_second", ",.0f")
    return [seconds, speed, part, _number(row, "planned", "memory_bytes", ".2f", GIB)]


def _number(row: Row, kind: str, key: str, form: str, unit: float = 1) -> str:
    value = (row[kind] or {}).get(key)
    return "–" if value is None else format(value / unit, form)


def draw_scaling(rows: Sequence[Row], out_png: Path) -> None:
    """Draw speed, efficiency, time and memory over nodes, a line for each split; what was planned dashed, if anything was.

    Args:
        out_png: the file to write, a PNG whatever its suffix.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    nodes = sorted({row["nodes"] for row in rows})
    figure = Figure(figsize=(14, 8), layout="constrained")
    FigureCanvasAgg(figure)
    *grid, last = figure.subplots(2, 3).flat
    for axes, (key, title, unit, size, logarithmic) in zip(grid, PANELS, strict=True):
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel("nodes")
        axes.set_ylabel(unit)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xscale("log", base=2)
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        _draw_panel(axes, rows, key, size)
        axes.set_xticks(nodes, [str(number) for number in nodes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(nodes[0] / 1.15, nodes[-1] * 1.15)
        axes.tick_params(labelsize=9)
        if not logarithmic:
            axes.set_ylim(0, 1.06 * axes.get_ylim()[1])
    last.set_axis_off()
    named = dict(zip(*reversed(grid[0].get_legend_handles_labels()), strict=True))
    last.legend(named.values(), named.keys(), loc="upper left", frameon=False, fontsize=11)
    figure.savefig(out_png, dpi=130, format="png")


def _draw_panel(axes: Axes, rows: Sequence[Row], key: str, size: float) -> None:
    for number, split in enumerate(dict.fromkeys(row["split"] for row in rows)):
        own = [row for row in rows if row["split"] == split]
        colour, marker = LINES[number % len(LINES)], MARKERS[number % len(MARKERS)]
        name = split or "measured"
        for kind, style in (
            ("measured", {"linewidth": 1.8, "label": name}),
            ("planned", {"linewidth": 1.2, "linestyle": "--", "markerfacecolor": "none", "label": f"{split} planned".strip()}),
        ):
            known = [row for row in own if (row[kind] or {}).get(key) is not None]
            if known:
                values = [row[kind][key] / size for row in known]
                axes.plot([row["nodes"] for row in known], values, color=colour, marker=marker, **style)
        if key == "tokens_per_second":
            _draw_ideal(axes, [row for row in own if row["measured"]])


def _draw_ideal(axes: Axes, own: Sequence[Row]) -> None:
    """As many times as fast as there are more nodes."""
    if len(own) < 2:
        return
    first, last = own[0], own[-1]
    speed = first["measured"]["tokens_per_second"]
    ends = [speed, speed * last["nodes"] / first["nodes"]]
    axes.plot([first["nodes"], last["nodes"]], ends, color="#777777", linewidth=1, linestyle=":", label="ideal")
