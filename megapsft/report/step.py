"""Where the time of a step goes: a table and JSON of a whole run, and a picture step by step."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.table

from megapsft.errors import Refused
from megapsft.metrics.names import PARTS
from megapsft.metrics.records import read_records
from megapsft.metrics.shown import Table
from megapsft.output.whole import write_whole
from megapsft.report.picture import need_matplotlib
from megapsft.report.png import save
from megapsft.report.table import to_rich

NAME = "time.json"
OTHER = "other"
BARS = 60  # of a run in the picture, at most: more steps share them
COLOURS = {
    "rollout_wait": "#e69f00", "weight_update": "#cc79a7", "data": "#999999", "old_policy": "#009e73", "reference": "#56b4e9",
    "critic": "#8c510a", "totals": "#b2df8a", "forward_backward": "#0072b2", "optimizer": "#d55e00", "checkpoint": "#666666",
    "evaluate": "#f0e442", OTHER: "#dddddd",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Of some steps, on the wall of the first rank."""

    steps: int
    seconds: float  # benchmarks included
    parts: dict[str, float]  # seconds by part; what is in none is OTHER, so that they add up
    tokens_per_second: float  # benchmarks left out, here and below
    tflops_per_device: float
    mfu: float | None  # where the peak of the device is known


def spent(records: Sequence[Mapping[str, Any]], after: Mapping[str, float] | None = None) -> Spent | None:
    """What the records of steps add up to; None where they say nothing of parts.

    Args:
        after: seconds by part of what came behind the last record: the last checkpoint, the last benchmarks.
    """
    timed = [record for record in records if record.get("perf/forward_backward_seconds") is not None]
    if not timed:
        return None
    found = {name: sum(record.get(f"perf/{name}_seconds", 0.0) for record in timed) for name in PARTS}
    training = sum(record["perf/seconds"] for record in timed)
    other = training + found["evaluate"] - sum(found.values())
    for name, seconds in (after or {}).items():
        found[name] += seconds
    parts = {name: seconds for name, seconds in found.items() if seconds} | {OTHER: other}

    def mean(key: str) -> float:
        return sum(record[key] * record["perf/seconds"] for record in timed) / training

    return Spent(
        steps=len(timed),
        seconds=sum(parts.values()),
        parts=parts,
        tokens_per_second=mean("perf/tokens_per_second"),
        tflops_per_device=mean("perf/tflops_per_device"),
        mfu=mean("perf/mfu") if all("perf/mfu" in record for record in timed) else None,
    )


def spent_by(run: Path, after: Mapping[str, float] | None = None) -> Spent | None:
    """Of the run in this folder; None where it has no records of steps yet."""
    file = run / "steps.jsonl"
    return spent(read_records(file), after) if file.is_file() else None


def step_table(found: Spent, title: str) -> rich.table.Table:
    """Seconds a step and share of each part, and how fast that was; for the terminal."""
    speed = f"{found.tokens_per_second:,.0f} tokens/s, {found.tflops_per_device:.3g} TFLOP/s a device"
    if found.mfu is not None:
        speed += f", MFU {found.mfu:.1%}"
    return to_rich(parts_of(found), title=f"{title}: where a step goes", caption=speed)


def parts_of(found: Spent) -> Table:
    """Seconds a step and share of each part, and of the whole."""
    parts = found.parts.items()
    rows = [(label(name), f"{seconds / found.steps:.4f}", f"{seconds / found.seconds:.1%}") for name, seconds in parts]
    whole = ("whole", f"{found.seconds / found.steps:.4f}", "")
    return Table("step", (f"part, mean of {found.steps} steps", "seconds a step", "share"), [*rows, whole])


def write_spent(found: Spent, run: Path) -> None:
    """RUN/time.json: the old file or the new one, never half of one."""
    content = dataclasses.asdict(found)
    content["parts"] = {name: {"seconds": s, "share": s / found.seconds} for name, s in found.parts.items()}
    write_whole(run / NAME, json.dumps(content, indent=1) + "\n")


def draw_steps(runs: Mapping[str, Path], out_png: Path) -> None:
    """Draw for each run its steps as stacked bars, seconds by part; where there are many, the mean of a few to a bar.

    Args:
        runs: label -> folder.
        out_png: where the picture goes; folders are made.

    Raises:
        Refused: no runs, or one without records of parts; matplotlib is not installed.
    """
    need_matplotlib("the picture")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    loaded = {name: read_records(folder / "steps.jsonl") for name, folder in runs.items()}
    if not loaded or not all(map(spent, loaded.values())):
        raise Refused("the picture", "needs runs whose steps.jsonl says what its parts took", "train a step first")
    figure = Figure(figsize=(12, 1 + 3.2 * len(loaded)), layout="constrained")
    FigureCanvasAgg(figure)
    handles: dict[str, Any] = {}
    for axes, (name, records) in zip(figure.subplots(len(loaded), squeeze=False).flat, loaded.items(), strict=True):
        axes.set_title(f"{name}: where a step goes", loc="left", fontsize=11, fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel("seconds a step")
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        cut = bars(records)
        at, widths = ([bar[key] for bar in cut] for key in ("at", "width"))
        floor = [0.0] * len(cut)
        for part, colour in COLOURS.items():
            heights = [bar["parts"].get(part, 0.0) for bar in cut]
            if any(heights):
                handles[part] = axes.bar(at, heights, widths, bottom=floor, color=colour, label=label(part))
                floor = [low + height for low, height in zip(floor, heights, strict=True)]
    shown = {part: handles[part] for part in COLOURS if part in handles}
    figure.legend(shown.values(), map(label, shown), loc="outside upper center", ncols=min(len(shown), 7), frameon=False)
    save(figure, out_png)


def bars(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """At most BARS of consecutive steps: where each stands, how wide it is, and the mean seconds of its parts."""
    size = -(-len(records) // BARS)
    found = []
    for start in range(0, len(records), size):
        some = records[start : start + size]
        one, first, last = spent(some), some[0]["step"], some[-1]["step"]
        if one is not None:
            parts = {name: seconds / one.steps for name, seconds in one.parts.items()}
            found.append({"at": (first + last) / 2, "width": last - first + 0.9, "parts": parts})
    return found


def label(part: str) -> str:
    return part.replace("_", " ")


__all__ = ["NAME", "Spent", "bars", "draw_steps", "parts_of", "spent", "spent_by", "step_table", "write_spent"]
