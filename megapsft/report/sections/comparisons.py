"""Models that were laid side by side: RUN/compare.json, as `megapsft compare --json` wrote it."""

from __future__ import annotations

import dataclasses

from megapsft.report.compare import figures, read_json
from megapsft.report.figure import Figure
from megapsft.report.folders import Shown
from megapsft.report.section import Section

FILE = "compare.json"


def section(shown: Shown) -> Section | None:
    found: list[Figure] = []
    for number, run in enumerate(shown.runs):
        if run.folder is not None and (run.folder / FILE).is_file():
            of_run = [one for several in figures(read_json(run.folder / FILE)).values() for one in several]
            found += [named(one, run.name, number) for one in of_run]
    note = "What training did to the probabilities of single tokens, on the same responses."
    return Section(name="Models side by side", figures=found, note=note) if found else None


def named(figure: Figure, run: str, number: int) -> Figure:
    """With the name of the run, where several have the same figure."""
    return dataclasses.replace(figure, name=f"{figure.name}-of-{number}", title=f"{run}: {figure.title}")


__all__ = ["FILE", "section"]
