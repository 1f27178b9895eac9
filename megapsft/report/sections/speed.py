"""How fast it went, where a step goes, and what memory it took."""

from __future__ import annotations

from collections.abc import Sequence

from megapsft.report.figure import Bars, Series
from megapsft.report.folders import Shown
from megapsft.report.lines import Curve
from megapsft.report.run import Run
from megapsft.report.section import Section, of_curves
from megapsft.report.step import COLOURS, label, spent

CURVES = (
    Curve(
        name="throughput", title="Throughput", unit="tokens/s", of="steps", keys={"perf/tokens_per_second": ""},
        note="Tokens without padding, all ranks, benchmarks left out.",
    ),
    Curve(name="seconds", title="Time of a step", unit="s", of="steps", keys={"perf/seconds": ""}),
    Curve(
        name="mfu", title="Model FLOP utilisation", unit="% of the peak", of="steps", size=0.01, keys={"perf/mfu": ""},
        note="Of the device's peak in bfloat16.",
    ),
    Curve(name="tflops", title="Speed of a device", unit="TFLOP/s", of="steps", keys={"perf/tflops_per_device": ""}),
    Curve(
        name="memory", title="Memory of the fullest rank", unit="GiB", of="steps", size=2**30, keys={"perf/memory_bytes": ""},
        note="Most so far: allocated by torch on a GPU, else resident.",
    ),
)  # fmt: skip


def section(shown: Shown) -> Section | None:
    found = of_curves("Speed and memory", CURVES, shown.runs)
    parts = step_parts(shown.runs)
    if parts is None:
        return found
    return Section(name="Speed and memory", figures=[*(found.figures if found else ()), parts])


def step_parts(runs: Sequence[Run]) -> Bars | None:
    """Seconds of a mean step by part, a bar for each run; None where no run recorded any."""
    timed = {run.name: found for run in runs if (found := spent(run.steps)) is not None}
    if not timed:
        return None
    return Bars(
        name="step-parts",
        title="Where a step goes",
        x_label="run",
        y_label="seconds a step",
        names=list(timed),
        stacked=True,
        series=[
            Series(name=label(part), values=[of.parts.get(part, 0.0) / of.steps for of in timed.values()], tint=colour)
            for part, colour in COLOURS.items()
            if any(of.parts.get(part) for of in timed.values())
        ],
        note="Mean over steps, on the wall of the first rank. docs/metrics.md says what each part is.",
    )


__all__ = ["CURVES", "section", "step_parts"]
