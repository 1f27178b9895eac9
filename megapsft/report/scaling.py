"""How a run scales over nodes and splits: a table on the terminal, as Markdown and JSON, and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from megapsft.output.whole import write_whole
from megapsft.report.figure import Chart, Line
from megapsft.report.png import write_png

REPORT, PICTURE = "report", "scaling.png"
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
    texts = {
        folder / f"{REPORT}.json": json.dumps({"notes": list(notes), "points": list(rows)}, indent=1) + "\n",
        folder / f"{REPORT}.md": to_markdown(rows, notes),
    }
    found = list(texts)
    for path, text in texts.items():
        write_whole(path, text)
    if any(row["measured"] for row in rows):
        draw_scaling(rows, folder / PICTURE)
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


def charts(rows: Sequence[Row], name: str = "scaling") -> list[Chart]:
    """Speed, efficiency, time and memory over nodes, a line for each split; what was planned dashed, if anything was."""
    splits = list(dict.fromkeys(row["split"] for row in rows))
    return [
        Chart(
            name=f"{name}-{key}", title=title, x_label="nodes", y_label=unit, log_x=True, log_y=logarithmic,
            lines=[line for number, split in enumerate(splits) for line in _lines(rows, split, number, key, size)],
        )
        for key, title, unit, size, logarithmic in PANELS
    ]  # fmt: skip


def draw_scaling(rows: Sequence[Row], out_png: Path) -> None:
    """Draw the charts.

    Args:
        out_png: the file to write, a PNG whatever its suffix.
    """
    write_png(charts(rows), out_png)


def _lines(rows: Sequence[Row], split: str, colour: int, key: str, size: float) -> list[Line]:
    own = [row for row in rows if row["split"] == split]
    found = []
    for kind, name in (("measured", split or "measured"), ("planned", f"{split} planned".strip())):
        known = [row for row in own if (row[kind] or {}).get(key) is not None]
        if known:
            nodes, values = [row["nodes"] for row in known], [row[kind][key] / size for row in known]
            found.append(Line(name=name, x=nodes, y=values, colour=colour, dashed=kind == "planned", dots=True))
    measured = [row for row in own if row["measured"]]
    if key == "tokens_per_second" and len(measured) > 1:
        found.append(_ideal(measured[0], measured[-1]))
    return found


def _ideal(first: Row, last: Row) -> Line:
    """As many times as fast as there are more nodes."""
    speed = first["measured"]["tokens_per_second"]
    nodes = [first["nodes"], last["nodes"]]
    return Line(name="ideal", x=nodes, y=[speed, speed * nodes[1] / nodes[0]], colour=None, dashed=True)
