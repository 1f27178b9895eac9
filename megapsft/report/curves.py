"""Training curves of one run or of several side by side, as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megapsft.errors import Refused
from megapsft.metrics.records import read_records
from megapsft.report.figure import Chart
from megapsft.report.lines import Curve, chart
from megapsft.report.png import canvas, save
from megapsft.report.run import Run, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NLL = Curve(
    name="nll", title="Negative log-likelihood", unit="nats a token", keys={"objective/nll": ""}, epochs=True,
    note="Of the trained tokens, whatever is minimised: it means the same for every objective.",
)  # fmt: skip
ENTROPY = Curve(
    name="entropy", title="Entropy", unit="nats a token", keys={"policy/entropy": ""}, epochs=True,
    note="Mean over the trained tokens, of the full vocabulary, at temperature 1.",
)  # fmt: skip
CLIP_FRACTION = Curve(
    name="clip-fraction", title="Clip fraction", unit="share of tokens", keys={"objective/clip_fraction": ""},
    note="Tokens whose loss clipping made strictly larger; of CISPO those whose ratio was clipped.",
)  # fmt: skip
RATIO_MAX = Curve(name="ratio-max", title="Largest ratio", unit="ratio", keys={"objective/ratio_max": ""}, log_y=True)
GRAD_NORM = Curve(
    name="grad-norm", title="Gradient norm", unit="L2 norm", keys={"train/grad_norm": ""}, log_y=True,
    note="Global, before clipping.",
)  # fmt: skip
LEARNING_RATE = Curve(name="learning-rate", title="Learning rate", unit="learning rate", keys={"train/lr": ""}, log_y=True)
PANELS = (NLL, ENTROPY, CLIP_FRACTION, RATIO_MAX, GRAD_NORM, LEARNING_RATE)  # in the order of the grid


def curves(runs: Sequence[Run]) -> list[Chart]:
    """The six panels over updates, each with a line for each run."""
    return [chart(panel, runs) for panel in PANELS]


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
    if not runs:
        raise Refused("curves", "need at least one run", "name a metrics.jsonl")
    loaded = [
        Run(name=label, colour=number, updates=read_records(path)) for number, (label, path) in enumerate(runs.items())
    ]  # fmt: skip
    for run in loaded:
        if not run.updates:
            raise Refused(str(runs[run.name]), "has no records", "wait for the first update of the run")
    sheet = canvas(curves(loaded))
    if len(loaded) == 1:
        _draw_own_loss(sheet.axes[0], loaded[0])
    save(sheet, out_png)


def _draw_own_loss(axes: Axes, run: Run) -> None:
    """Draw what was minimised over a scale of its own, right of the nll. Nothing for SFT, whose loss is the nll."""
    losses = series([record if record.get("objective") != "sft" else {} for record in run.updates], "train/loss")
    if all(map(math.isnan, losses)):
        return
    right = axes.twinx()
    right.spines[["top", "right"]].set_visible(False)
    right.tick_params(labelsize=9, colors="#777777")
    updates = [record["update"] for record in run.updates]
    style = {"color": "#777777", "linewidth": 1, "linestyle": "--", "alpha": 0.7}
    right.legend(handles=right.plot(updates, losses, label="loss (right scale)", **style), frameon=False, fontsize=8)


__all__ = ["PANELS", "curves", "draw_curves"]
