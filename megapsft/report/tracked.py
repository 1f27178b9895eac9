"""What trackers show of a run beside its curves: the pictures and tables of `megapsft curves`, and its benchmarks."""

from __future__ import annotations

from pathlib import Path

from megapsft.metrics.records import read_records
from megapsft.metrics.shown import Picture, Shown
from megapsft.report.curves import draw_curves
from megapsft.report.evaluations import benchmarks_of, draw_evaluations, evaluations_of
from megapsft.report.picture import has_matplotlib
from megapsft.report.step import draw_steps, parts_of, spent_by
from megapsft.report.table import phases_of

FOLDER = "pictures"  # of the run


def tracked(run: Path) -> list[Shown]:
    """Of the records that the run in this folder has so far; pictures lie in RUN/pictures.

    Without matplotlib there are tables alone.
    """
    found: list[Shown] = []
    updates, evaluations = (read_records(run / f"{name}.jsonl") for name in ("metrics", "evaluations"))
    timed, pictures, drawn = spent_by(run), run / FOLDER, has_matplotlib()
    if updates:
        found.append(phases_of(updates))
        if drawn:
            draw_curves({run.name: run / "metrics.jsonl"}, pictures / "curves.png")
            found.append(Picture("curves", pictures / "curves.png"))
    if timed is not None:
        found.append(parts_of(timed))
        if drawn:
            draw_steps({run.name: run}, pictures / "step.png")
            found.append(Picture("step", pictures / "step.png"))
    if evaluations:
        found.append(evaluations_of(evaluations))
        if drawn:
            draw_evaluations(benchmarks_of(evaluations), "Mean score (avg@n)", pictures / "evaluations.png")
            found.append(Picture("evaluations", pictures / "evaluations.png"))
    return found


__all__ = ["FOLDER", "tracked"]
