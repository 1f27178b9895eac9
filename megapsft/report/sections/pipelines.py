"""What each stage of a pipeline made of the model."""

from __future__ import annotations

from megapsft.report.figure import Grid
from megapsft.report.folders import Pipeline, Shown
from megapsft.report.hand_off import bars, hand_off_of
from megapsft.report.section import Section


def section(shown: Shown) -> Section | None:
    compared = [pipeline for pipeline in shown.pipelines if pipeline.rows]
    figures = [figure for pipeline in compared for figure in (_table(pipeline), *bars(pipeline.rows, pipeline.name))]
    waiting = [pipeline.name for pipeline in shown.pipelines if not pipeline.rows]
    note = f"Nothing was compared yet by {', '.join(waiting)}." if waiting else ""
    return Section(name="From stage to stage", figures=figures, note=note) if figures or waiting else None


def _table(pipeline: Pipeline) -> Grid:
    table = hand_off_of(pipeline.rows)
    return Grid(
        name=f"hand-off-{pipeline.name}",
        title=f"{pipeline.name}: the model after each stage",
        heading=table.heading,
        rows=table.rows,
        numbers=frozenset(range(table.texts, len(table.heading))),
        note="Accuracies in % with their standard errors, lengths in tokens, entropy and KL from the start in nats a token, "
        "on the stage's own responses.",
    )


__all__ = ["section"]
