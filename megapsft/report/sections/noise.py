"""How far numerics alone moved the ratio before anything was learned, where the gate measured it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megapsft.report.figure import Bars, Grid, Series
from megapsft.report.folders import Shown
from megapsft.report.run import Run
from megapsft.report.section import Section


def section(shown: Shown) -> Section | None:
    measured = [run for run in shown.runs if run.noise]
    if not measured:
        return None
    return Section(name="Noise of ratios", figures=[noise_table(measured), noise_quantiles(measured)])


def noise_table(runs: Sequence[Run]) -> Grid:
    """A row for each run: what clipping would have cut of ratios that should be 1."""
    heading = ["run", "ratios", "differ from 1 (%)", "mean |log-ratio| (nats)", "clipped (%)", "limit (%)"]
    return Grid(name="noise", title="Before the first step", heading=heading, rows=[_row(run.name, run.noise) for run in runs],
                numbers=frozenset(range(1, 6)), note="docs/noise.md says where it comes from.")  # fmt: skip


def _row(name: str, noise: Mapping[str, Any]) -> list[str]:
    shares = [f"{100 * noise[key]:.3g}" for key in ("differ", "clipped", "limit")]
    ratios = f"{noise['count']:,} {noise['unit']}"
    return [name, ratios, shares[0], f"{noise['mean_abs_log_ratio']:.3g}", *shares[1:]]


def noise_quantiles(runs: Sequence[Run]) -> Bars:
    """|ratio - 1| at the quantiles that the gate keeps, a bar for each run."""
    parts = list(dict.fromkeys(part for run in runs for part in run.noise["quantiles"]))
    series = [
        Series(name=run.name, colour=run.colour, values=[run.noise["quantiles"].get(part, float("nan")) for part in parts])
        for run in runs
    ]
    names = [f"{100 * float(part):g} % quantile" for part in parts]
    return Bars(name="noise-quantiles", title="How far ratios are from 1", x_label="quantile", y_label="|ratio - 1|", names=names,
                series=series)  # fmt: skip


__all__ = ["noise_quantiles", "noise_table", "section"]
