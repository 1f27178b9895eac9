"""Where training went in the space of probabilities: models by their distance to reference models (SRFT, Fig. 3)."""

from __future__ import annotations

from pathlib import Path

from megapsft.report.figure import Chart, Grid, Line
from megapsft.train.comparison import Comparison, Seen

DISTANCE = "mean |p − p reference| (no unit)"
NOTE = (
    "A dot is a model, and a line joins those of one name in their order, beginning at the base. The distance to a reference is "
    "the mean over responses of the mean over their tokens of |p − p reference|: 0 to itself, at most 1."
)


def distances(comparison: Comparison) -> dict[str, list[tuple[Seen, list[float]]]]:
    """Name -> its models in order, the base first, each with its distances: to the base, then to each reference."""
    to = (comparison.base, *comparison.references)

    def placed(seen: Seen) -> tuple[Seen, list[float]]:
        return seen, [comparison.distance(seen, reference) for reference in to]

    paths: dict[str, list[tuple[Seen, list[float]]]] = {}
    for seen in comparison.tuned:
        paths.setdefault(seen.name, [placed(comparison.base)]).append(placed(seen))
    return paths


def dynamics(comparison: Comparison) -> list[Chart]:
    """A chart for each reference, over the distance to the base; where there is none, the distance to the base over the order."""
    paths = distances(comparison)
    charts = []
    for number, reference in enumerate(comparison.references, start=1):
        lines = [
            Line(name=name, x=[d[0] for _, d in path], y=[d[number] for _, d in path], colour=colour, dots=True)
            for colour, (name, path) in enumerate(paths.items(), start=1)
        ]
        charts.append(
            Chart(
                name=f"dynamics-{number}",
                title=f"Distance to {reference.name} over distance to {comparison.base.name}",
                x_label=f"to {comparison.base.name}: {DISTANCE}",
                y_label=f"to {reference.name}",
                lines=lines,
                note=NOTE,
            )
        )
    if charts or len(comparison.tuned) < 2:
        return charts
    lines = [
        Line(name=name, x=list(range(len(path))), y=[d[0] for _, d in path], colour=colour, dots=True)
        for colour, (name, path) in enumerate(paths.items(), start=1)
    ]
    return [
        Chart(
            name="dynamics",
            title=f"Distance to {comparison.base.name}",
            x_label="models of the name, in their order",
            y_label=DISTANCE,
            lines=lines,
            note=NOTE,
        )
    ]


def distance_grid(comparison: Comparison) -> Grid:
    """The same in numbers, the references among themselves too."""
    to = (comparison.base, *comparison.references)
    rows = [
        [seen.name, Path(seen.path).name, *(f"{comparison.distance(seen, reference):.5f}" for reference in to)]
        for seen in (*to, *comparison.tuned)
    ]
    heading = ["model", "folder", *(f"to {reference.name}" for reference in to)]
    return Grid(
        name="distances", title=f"Distances: {DISTANCE}", heading=heading, rows=rows, numbers=frozenset(range(2, len(heading)))
    )


__all__ = ["distance_grid", "distances", "dynamics"]
