"""What the project's benchmarks measured: speed and memory, beside the runs."""

from __future__ import annotations

from dataclasses import replace

from megapsft.report.folders import Shown
from megapsft.report.section import Section


def section(shown: Shown) -> Section | None:
    figures = [
        replace(figure, name=f"measured-{number}-{figure.name}", title=f"{one.name}: {figure.title}")
        for number, one in enumerate(shown.measurements)
        for figure in one.figures
    ]
    notes = ". ".join(one.note for one in shown.measurements)
    return Section(name="Measurements", figures=figures, note=f"{notes}.") if figures else None


__all__ = ["section"]
