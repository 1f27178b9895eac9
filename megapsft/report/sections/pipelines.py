"""What each stage of a pipeline made of the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from megapsft.report.figure import Bars, Grid, Series
from megapsft.report.folders import Pipeline, Shown
from megapsft.report.hand_off import hand_off_of, of_passes
from megapsft.report.run import Record
from megapsft.report.section import Section


def section(shown: Shown) -> Section | None:
    compared = [pipeline for pipeline in shown.pipelines if pipeline.rows]
    figures = [figure for pipeline in compared for figure in (_table(pipeline), *_bars(pipeline))]
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


def _bars(pipeline: Pipeline) -> Iterator[Bars]:
    """A figure for each quantity, a bar for each stage and benchmark. k1 is in the table alone: it may be negative."""
    titles = {"avg": ("accuracy", "% of responses", 100.0)}
    titles |= {key: (key, "% of problems", 100.0) for key in of_passes(pipeline.rows)[-1:]}
    titles |= {"length": ("length of responses", "tokens", 1.0), "entropy": ("entropy", "nats a token", 1.0)}
    titles |= {"kl_k3": ("KL from the start (k3)", "nats a token", 1.0)}
    stages, benchmarks = (list(dict.fromkeys(row[key] for row in pipeline.rows)) for key in ("stage", "benchmark"))
    for number, (key, (title, unit, size)) in enumerate(titles.items()):
        errors = any(row.get(f"{key}_se") is not None for row in pipeline.rows)
        series = []
        for colour, benchmark in enumerate(benchmarks):
            own = {row["stage"]: row for row in pipeline.rows if row["benchmark"] == benchmark}
            values, halves = (_of_stages(own, stages, of, size) for of in (key, f"{key}_se"))
            series.append(Series(name=benchmark, values=values, errors=halves if errors else None, colour=colour))
        yield Bars(
            name=f"hand-off-{pipeline.name}-{number}",
            title=f"{pipeline.name}: {title}",
            x_label="stage",
            y_label=unit,
            names=stages,
            series=series,
            note="Error bars are one standard error." if errors else "",
        )


def _of_stages(own: Mapping[str, Record], stages: Sequence[str], key: str, size: float) -> list[float]:
    """nan where a stage has no such number."""
    found = [own.get(stage, {}).get(key) for stage in stages]
    return [math.nan if value is None else size * value for value in found]


__all__ = ["section"]
