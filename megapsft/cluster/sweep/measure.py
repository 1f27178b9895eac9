"""What the runs of a sweep measured, beside what was planned: a row for each point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megapsft.cluster.memory import RUNTIME
from megapsft.cluster.sweep.points import SETTLING, Asked, Point
from megapsft.cluster.sweep.sweep import State
from megapsft.cluster.workload import ASSUMED
from megapsft.metrics.records import read_records
from megapsft.platform.chips import GIB


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of the steps after the first, in which nothing has settled yet."""

    steps: int
    seconds_per_step: float  # the median
    tokens_per_second: float  # real tokens over all ranks, the median
    memory_bytes: float | None  # of the fullest rank


def measured(run: Path) -> Measured | None:
    """None where there are too few steps yet."""
    file = run / "steps.jsonl"
    records = read_records(file) if file.is_file() else []
    settled = [record for record in records[SETTLING:] if record.get("perf/seconds")]
    if not settled:
        return None
    return Measured(
        steps=len(settled),
        seconds_per_step=median(record["perf/seconds"] for record in settled),
        tokens_per_second=median(record["perf/tokens_per_second"] for record in settled),
        memory_bytes=max((record["perf/memory_bytes"] for record in settled if record.get("perf/memory_bytes")), default=None),
    )


def rows(points: Sequence[Point], states: Mapping[str, State]) -> list[dict[str, Any]]:
    """Plain values for `megapsft.report.scaling`; `efficiency` is against the fewest nodes of the same split.

    What is planned of memory is without the share of the runtime, which torch does not count either.
    """
    found = [_row(point, states[point.name]) for point in points]
    for kind in ("measured", "planned"):
        _add_efficiency([row for row in found if row[kind]], kind)
    return found


def _row(point: Point, state: State) -> dict[str, Any]:
    seen, plan = measured(Path(point.config.run.dir)), point.predicted
    known: dict[str, Any] = {"measured": None, "planned": None}
    if seen is not None:
        known["measured"] = vars(seen) | {"tokens_per_second_per_rank": seen.tokens_per_second / point.ranks}
    if plan is not None:
        known["planned"] = {
            "seconds_per_step": plan.time.total,
            "tokens_per_second": plan.tokens_per_second,
            "tokens_per_second_per_rank": plan.tokens_per_second / point.ranks,
            "memory_bytes": plan.peak - RUNTIME,
        }
    return {
        "point": point.name,
        "nodes": point.nodes,
        "ranks": point.ranks,
        "split": point.split,
        "varied": dict(point.varied),
        "batch_size": point.config.train.batch_size,
        "state": state.name,
        "why": state.why,
        "job": state.job,
        **known,
    }


def _add_efficiency(found: Sequence[dict[str, Any]], kind: str) -> None:
    for row in found:
        base = min((other for other in found if other["split"] == row["split"]), key=lambda other: other["nodes"])
        speed, unscaled = row[kind]["tokens_per_second_per_rank"], base[kind]["tokens_per_second_per_rank"]
        row[kind] |= {"efficiency": speed / unscaled, "base_nodes": base["nodes"]}


def notes(asked: Asked, points: Sequence[Point]) -> list[str]:
    """What the figures rest on."""
    batch = {
        "strong": "strong scaling: the batch of a step is the same for all",
        "weak": f"weak scaling: the batch of a step is that of the config on {min(asked.nodes)} node(s), and grows with them",
    }[asked.scaling]
    lines = [
        f"{batch}; {asked.ranks_per_node} rank(s) a node",
        f"seconds and tokens are medians over the steps after the first {SETTLING} of {asked.steps}; padding is not counted",
        "efficiency is tokens/s of a rank against that on the fewest nodes of the same split that have been measured",
    ]
    if asked.gpu is None:
        return [*lines, "nothing is planned: no GPU is named. Memory on a CPU is what was resident in a process"]
    lengths = sorted({str(point.predicted.work.length) for point in points if point.predicted is not None})
    return [
        *lines,
        f"memory is what torch allocated on the fullest rank, and planned without the {RUNTIME / GIB:.0f} GiB of the runtime",
        f"planned for {asked.gpu} at the speed of tuned runs; {ASSUMED} ({', '.join(lengths)} tokens a sample)",
    ]
