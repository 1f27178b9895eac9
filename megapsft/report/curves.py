"""Training curves of one run or of several side by side, as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megapsft.errors import Refused
from megapsft.metrics.records import read_records
from megapsft.report.phases import phases
from megapsft.report.picture import LINES, need_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

PANELS = (  # key, title, logarithmic; in the order of the grid
    ("objective/nll", "Negative log-likelihood (nats a token)", False),
    ("policy/entropy", "Entropy (nats a token)", False),
    ("objective/clip_fraction", "Clip fraction", False),
    ("objective/ratio_max", "Largest ratio", True),
    ("train/grad_norm", "Gradient norm", True),
    ("train/lr", "Learning rate", True),
)
WARMUP_SHADE = "#f3e9d2"


def draw_curves(runs: Mapping[str, str | Path], out_png: str | Path) -> None:
    """Draw loss, entropy, clip fraction, largest ratio, gradient norm and learning rate over updates.

    The loss is shown as nll, which means the same for every objective; where there is one run, what it minimised is drawn
    beside it, dashed and over a scale of its own. The warm-up is shaded, for several runs up to the end of the longest.

    Args:
        runs: label -> metrics.jsonl; all in the same axes.
        out_png: where the picture goes; folders are made.

    Raises:
        Refused: no runs, no such file, no records, or matplotlib is not installed.
    """
    need_matplotlib("curves")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

    if not runs:
        raise Refused("curves", "need at least one run", "name a metrics.jsonl")
    loaded = {label: read_records(path) for label, path in runs.items()}
    for label, records in loaded.items():
        if not records:
            raise Refused(str(runs[label]), "has no records", "wait for the first update of the run")
    cuts = {label: phases(records) for label, records in loaded.items()}
    warmup = max((phase.records[-1]["update"] for cut in cuts.values() for phase in cut if phase.name == "warmup"), default=None)
    first = min(records[0]["update"] for records in loaded.values())
    last = max(records[-1]["update"] for records in loaded.values())

    figure = Figure(figsize=(15, 8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (key, title, logarithmic) in zip(figure.subplots(2, 3, sharex=True).flat, PANELS, strict=True):
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.margins(x=0)
        if logarithmic and any(value > 0 for records in loaded.values() for value in series(records, key)):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        for number, (label, records) in enumerate(loaded.items()):
            style = {"color": LINES[number % len(LINES)], "linewidth": 1.6, "marker": "o" if len(records) == 1 else None}
            updates = [record["update"] for record in records]
            axes.plot(updates, series(records, key), label=label, **style)
        if warmup is not None:
            axes.axvspan(first, warmup + 0.5, color=WARMUP_SHADE, zorder=0, label="warm-up")
            axes.axvline(warmup + 0.5, color="#b59b5b", linewidth=1, linestyle=":")
        axes.set_xlim(first, max(last, first + 1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelsize=9)
    for axes in figure.axes[3:]:
        axes.set_xlabel("update")
    handles = figure.axes[0].get_legend_handles_labels()[0]
    if len(loaded) == 1:
        handles += draw_own_loss(figure.axes[0], next(iter(loaded.values())))
    labels = [handle.get_label() for handle in handles]
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 6), frameon=False, fontsize=11)

    out_png = Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png, dpi=130)


def draw_own_loss(axes: Axes, records: list[dict]) -> list[Line2D]:
    """Draw what was minimised over a scale of its own, right of the nll. Nothing for SFT, whose loss is the nll."""
    losses = series([record if record.get("objective") != "sft" else {} for record in records], "train/loss")
    if all(map(math.isnan, losses)):
        return []
    right = axes.twinx()
    right.spines[["top", "right"]].set_visible(False)
    right.tick_params(labelsize=9, colors="#777777")
    updates = [record["update"] for record in records]
    return right.plot(updates, losses, color="#777777", linewidth=1, linestyle="--", alpha=0.7, label="loss (right scale)")


def series(records: list[dict], key: str) -> list[float]:
    """[n] values over the records, nan (a gap in the line) where a record has none."""
    return [float("nan") if record.get(key) is None else record[key] for record in records]
