"""The noise floor of the ratio, and what the precision does to the model: a sentence, tables, JSON and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from megapsft.output.whole import write_whole
from megapsft.report.picture import LINES
from megapsft.report.png import save
from megapsft.train.noise import QUANTILES, Floor, Row
from megapsft.train.plan import RunPlan
from megapsft.train.precision import Precision
from megapsft.train.probe import Probe

SECTIONS = {
    "configured": "this run",
    "repeated": "this run",
    "removed": "one thing less",
    "not shared": "old pass alone",
}
QUANTITIES = {  # of a token: field of Precision -> what it is called
    "logits_rms": "logits, rms",
    "logits_max": "logits, largest",
    "logprob": "log-probability",
    "kl": "KL",
}
FLIPS = "flips: share of tokens x layers with another set of experts"
POINTS = 400  # of a line in the picture


def show_probe(probe: Probe) -> None:
    """Print the tables, the notes and the verdict."""
    console = Console()
    console.print(probe_table(probe))
    for precision in probe.precisions:
        console.print(precision_table(precision))
    for note in probe.notes:
        console.print(f"[yellow]note:[/] {note}", highlight=False)
    console.print(verdict(probe), highlight=False, soft_wrap=True)
    if probe.limit is not None:
        console.print(at_the_gate(probe), highlight=False, soft_wrap=True)


def at_the_gate(probe: Probe) -> str:
    """In one sentence: whether training would be refused for this noise."""
    refused = probe.floor(probe.rows[0]).clipped > probe.limit
    return f"Training would {'be refused' if refused else 'begin'}: train.max_noise_clipped is {_percent(probe.limit)}."


def verdict(probe: Probe) -> str:
    """In one sentence: whether the run's ratios are 1; if not, why, and what to do; if so, what another old pass would do."""
    first, count = probe.rows[0], len(probe.rows[0].log_ratios)
    floor = probe.floor(first)
    if floor.differ == 0:
        text = f"The training pass has the bits of the old pass: ratios are exactly 1 on {count:,} {probe.unit}"
        others = [row for row in probe.rows if row.kind == "not shared" and not row.replayed]
        if others:
            text += "; " + _worst(probe, max(others, key=lambda row: (probe.floor(row).clipped, probe.floor(row).mean)))
        return text + "."
    text = f"Noise alone clips {_percent(floor.clipped)} of {count:,} {probe.unit} (ratios are up to {_number(floor.largest)} "
    text += f"from 1, 99 % of them within {_number(floor.quantiles[0.99])}); "
    cause = probe.cause()
    if cause is not None:
        return text + f"the cause is {cause.cause}; remedy: {cause.remedy}."
    if any(row.kind == "repeated" for row in probe.rows):
        return text + "the cause is the device, on which the same pass twice gives other bits; remedy: deterministic kernels."
    return text + "no feature turned off by itself halves it."


def _worst(probe: Probe, row: Row) -> str:
    floor = probe.floor(row)
    if floor.differ == 0:
        return "so they would be with every other old pass of the table"
    text = f"with the old pass {row.title} 99 % of ratios would be within {_number(floor.quantiles[0.99])} of 1 and noise alone "
    text += f"would clip {_percent(floor.clipped)}"
    for other in probe.rows:
        if (other.kind, other.title, other.replayed) == (row.kind, row.title, True):
            floor = probe.floor(other)
            text += f", with routing replay {_number(floor.quantiles[0.99])} and {_percent(floor.clipped)}"
    return text


def probe_table(probe: Probe) -> Table:
    """One row a comparison; the columns of routing are there only for experts."""
    experts = any(row.replayed is not None for row in probe.rows)
    count = len(probe.rows[0].log_ratios)
    title = f"|ratio - 1| without any update, {count:,} {probe.unit}; clip range {clip_range(probe)}"
    table = Table(title=title, box=box.SIMPLE, padding=0, caption_justify="left")
    table.add_column("old pass", no_wrap=True)
    headings = ["≠ 1", "mean", *(f"{100 * q:g}%" for q in QUANTILES), "max", "clip"]
    for heading in headings + (["flips"] if experts else []):
        table.add_column(heading, justify="right", no_wrap=True)
    section = None
    for row in probe.rows:
        if SECTIONS[row.kind] != section:
            section = SECTIONS[row.kind]
            table.add_section()
            table.add_row(f"[bold]{section}")
        floor = probe.floor(row)
        flips = "–" if row.flipped is None else _percent(row.flipped)
        sizes = (floor.mean, *floor.quantiles.values(), floor.largest)
        cells = [_percent(floor.differ), *map(_number, sizes), _percent(floor.clipped)]
        table.add_row(name(row), *cells, *([flips] if experts else []))
    table.caption = "mean: of |log ratio|; clip: share outside the clip range" + ("\n" + FLIPS if experts else "")
    return table


def precision_table(precision: Precision) -> Table:
    """One row a quantity; errors of logits are relative."""
    title = f"{precision.name} beside {precision.finer}, {len(precision.kl):,} tokens"
    table = Table(title=title, box=box.SIMPLE, padding=0, caption_justify="left")
    table.add_column("of a token", no_wrap=True)
    for heading in ("mean", *(f"{100 * q:g}%" for q in QUANTILES), "max"):
        table.add_column(heading, justify="right", no_wrap=True)
    for field, title in QUANTITIES.items():
        values = getattr(precision, field)
        table.add_row(title, *map(_number, (values.mean(), *np.quantile(values, QUANTILES), values.max())))
    same = _percent(precision.same_top)
    table.caption = f"logits: error relative to those of {precision.finer}; log-probability: |difference|\n"
    table.caption += f"the likeliest next word is the same for {same} of the tokens"
    return table


def name(row: Row) -> str:
    """What a row is called where its section is known."""
    if row.kind == "configured":
        return {None: "as configured", False: "free routing", True: "routing replay"}[row.replayed]
    return "  with replay" if row.replayed and row.kind == "not shared" else row.title


def clip_range(probe: Probe) -> str:
    low = "0" if probe.clip_low is None else f"{1 - probe.clip_low:g}"
    return f"{low} to {'inf' if probe.clip_high is None else f'{1 + probe.clip_high:g}'}"


def write_probe(probe: Probe, plan: RunPlan, out: Path) -> None:
    """Everything that the table says, and of what, as JSON; folders are made."""
    cause = probe.cause()
    content = {
        "verdict": verdict(probe),
        "cause": cause.key if cause else None,
        "remedy": cause.remedy if cause else None,
        "notes": probe.notes,
        "unit": probe.unit,
        "count": len(probe.rows[0].log_ratios),
        "clip_low": probe.clip_low,
        "clip_high": probe.clip_high,
        "model": plan.config.model.path,
        "dtype": plan.config.model.dtype,
        "fp8": plan.config.fp8.format,
        "mesh": plan.mesh.describe(),
        "max_noise_clipped": probe.limit,
        "rows": [_row_json(row, probe.floor(row)) for row in probe.rows],
        "precisions": [_precision_json(precision) for precision in probe.precisions],
    }
    write_whole(out, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _row_json(row: Row, floor: Floor) -> dict[str, Any]:
    return {
        "kind": row.kind,
        "title": row.title,
        "feature": row.feature,
        "routing_replay": row.replayed,
        "differ": floor.differ,
        "mean_abs_log_ratio": floor.mean,
        "quantiles": {str(q): value for q, value in floor.quantiles.items()},
        "max": floor.largest,
        "clipped": floor.clipped,
        "flipped": row.flipped,
    }


def _precision_json(precision: Precision) -> dict[str, Any]:
    found: dict[str, Any] = {"name": precision.name, "finer": precision.finer, "same_top": precision.same_top}
    for field in QUANTITIES:
        values = getattr(precision, field)
        quantiles = {str(q): float(np.quantile(values, q)) for q in QUANTILES}
        found[field] = {"mean": float(values.mean()), "quantiles": quantiles, "max": float(values.max())}
    return found


def draw_probe(probe: Probe, plan: RunPlan, out_png: Path) -> None:
    """For every row the share of ratios that are further from 1 than x, over x, both logarithmic; the clip range is marked.

    Rows with replay are dashed, in the colour of the row without. Under it, for each finer precision, what it does to a token.

    Args:
        out_png: where the picture goes; folders are made.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = 1 + len(probe.precisions)
    figure = Figure(figsize=(10, 6 * panels), layout="constrained")
    FigureCanvasAgg(figure)
    ratios, *others = figure.subplots(panels, squeeze=False)[:, 0]
    _draw_ratios(ratios, probe)
    ratios.set_title(
        f"Noise floor of the ratio: {plan.hf.architecture}, {plan.config.model.dtype}, {plan.mesh.describe()}",
        loc="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    for axes, precision in zip(others, probe.precisions, strict=True):
        _draw_precision(axes, precision)
    save(figure, out_png)


def _draw_ratios(axes: Any, probe: Probe) -> None:
    titles = list(dict.fromkeys((row.kind, row.title) for row in probe.rows))
    for row in probe.rows:
        x, share = tail(np.abs(np.expm1(row.log_ratios)))
        label = f"{SECTIONS[row.kind]}: {row.title}" + (", routing replay" if row.replayed else "")
        colour = LINES[titles.index((row.kind, row.title)) % len(LINES)]
        style = {"color": colour, "linestyle": "--" if row.replayed else "-", "linewidth": 1.8}
        axes.plot(x, share, label=label + ("" if len(x) else " (exactly 1)"), **style)
    for side, bound in (("high", probe.clip_high), ("low", probe.clip_low)):
        if bound:
            marked = f"clip_{side} = {bound:g}"
            axes.axvline(bound, color="#333333", linewidth=1.2, linestyle=":" if side == "high" else "-.", label=marked)
    _dress(axes, len(probe.rows[0].log_ratios))
    axes.set_xlabel("|ratio − 1| (no unit)")
    axes.set_ylabel(f"share of {probe.unit} further from 1")


def _draw_precision(axes: Any, precision: Precision) -> None:
    for colour, (field, title) in zip(LINES, QUANTITIES.items(), strict=False):
        x, share = tail(np.abs(getattr(precision, field)))
        axes.plot(x, share, color=colour, linewidth=1.8, label=title)
    _dress(axes, len(precision.kl))
    axes.set_title(f"{precision.name} beside {precision.finer}", loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel("relative error of logits (no unit), |difference| of log-probabilities and KL (nats)")
    axes.set_ylabel("share of tokens with more")


def _dress(axes: Any, count: int) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(0.5 / count, 1.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False, fontsize=9, loc="lower left")


def tail(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(x, share): the share of [n] sizes that are >= x at so many of their values, ascending; none where all are 0."""
    away = np.sort(sizes)
    share = 1 - np.arange(len(away)) / len(away)
    x, share = away[away > 0], share[away > 0]
    # even on the logarithmic axis of shares, or the few tokens that matter would be lost
    picked = len(x) - np.unique(np.geomspace(1, len(x), POINTS).astype(int))[::-1] if len(x) else np.empty(0, dtype=int)
    return x[picked], share[picked]


def _percent(share: float) -> str:
    if 0 < share < 0.001:
        return "<0.1%"
    return f"{100 * share:.2g}%" if share < 0.995 else f"{100 * share:.4g}%"


def _number(size: float) -> str:
    mantissa, _, exponent = f"{size:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if size else "0"


__all__ = [
    "at_the_gate",
    "draw_probe",
    "precision_table",
    "probe_table",
    "show_probe",
    "tail",
    "verdict",
    "write_probe",
]
