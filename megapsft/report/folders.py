"""What lies in the folders that a report is of: runs, pipelines with the runs of their stages, sweeps; benchmarks' files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megapsft.config import flatten_tree, read_yaml
from megapsft.errors import Refused
from megapsft.metrics.records import read_records
from megapsft.report.run import Record, Run
from megapsft.report.stored import Measurement, read_measurement

RECORDS, HAND_OFF, SWEEP, SCALING, NOISE = "metrics.jsonl", "hand-off.json", "sweep.json", "report.json", "noise.json"
REMEDY = (
    f"name folders of runs (with {RECORDS}), of pipelines (with {HAND_OFF}, or runs with a YAML beside each) "
    f"or of sweeps (with {SWEEP}), or JSON of benchmarks"
)


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """What each stage made of the model."""

    name: str
    rows: Sequence[Record]  # of a stage and a benchmark each, as `report.hand_off` says; none where nothing was compared yet


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """How a run scales."""

    name: str
    rows: Sequence[Record]  # of a point each, as `report.scaling` says
    notes: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """All that a report shows."""

    runs: Sequence[Run] = ()
    pipelines: Sequence[Pipeline] = ()
    sweeps: Sequence[Sweep] = ()
    measurements: Sequence[Measurement] = ()


def read_folders(folders: Sequence[Path]) -> Shown:
    """Runs, those of a pipeline's stages among them, have names that tell them apart: the last parts of their paths.

    Raises:
        Refused: no folders, one twice, one that is neither a run nor a pipeline nor a sweep; records that are not JSON; a file
            that is not of a benchmark.
    """
    if not folders:
        raise Refused("report", "needs at least one folder", REMEDY)
    runs: list[Path] = []
    pipelines, sweeps, measurements = [], [], []
    for folder in folders:
        if [other.resolve() for other in folders].count(folder.resolve()) > 1:
            raise Refused(str(folder), "is named twice", "name it once")
        if folder.is_file():
            measurements.append(read_measurement(folder))
        elif (folder / SWEEP).is_file():
            sweeps.append(_sweep(folder))
        elif is_run(folder):
            runs.append(folder)
        elif (folder / HAND_OFF).is_file() or _stages(folder):
            rows = _json(folder / HAND_OFF, list) if (folder / HAND_OFF).is_file() else []
            pipelines.append(Pipeline(name=folder.resolve().name, rows=rows))
            runs += [stage for stage in _in_order(folder, rows) if stage not in runs]
        else:
            raise Refused(str(folder), "is neither a run nor a pipeline nor a sweep", REMEDY)
    named = zip(runs, names(runs), strict=True)
    read = [replace(read_run(run, name), colour=number) for number, (run, name) in enumerate(named)]
    return Shown(runs=read, pipelines=pipelines, sweeps=sweeps, measurements=measurements)


def is_run(folder: Path) -> bool:
    """Whether a run was started here, or lies here with what it recorded."""
    return (folder / RECORDS).is_file()


def read_run(folder: Path, name: str) -> Run:
    """What is there of a run: all of it may still be written, and older runs recorded less."""

    def records(file: str) -> list[dict[str, Any]]:
        return read_records(folder / file) if (folder / file).is_file() else []

    config, revision = folder / "config.yaml", folder / "revision.txt"
    return Run(
        name=name,
        folder=folder,
        updates=records(RECORDS),
        steps=records("steps.jsonl"),
        evaluations=records("evaluations.jsonl"),
        config=flatten_tree(read_yaml(config)) if config.is_file() else {},
        revision=revision.read_text().strip() if revision.is_file() else "",
        noise=_json(folder / NOISE, dict) if (folder / NOISE).is_file() else {},
    )


def names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path; where several share it as many more as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    counts = [1] * len(parts)
    while True:
        found = ["/".join(own[-count:]) for own, count in zip(parts, counts, strict=True)]
        again = [number for number, name in enumerate(found) if found.count(name) > 1]
        if not again:
            return found
        for number in again:
            counts[number] += 1


def _stages(folder: Path) -> list[Path]:
    """Runs with a YAML of their name beside them, as a pipeline writes it."""
    return sorted(file.with_suffix("") for file in folder.glob("*.yaml") if is_run(file.with_suffix("")))


def _in_order(folder: Path, rows: Sequence[Record]) -> list[Path]:
    """The stages as they were compared, then those that were not yet."""
    stages, compared = _stages(folder), [row["stage"] for row in rows]
    return sorted(stages, key=lambda stage: compared.index(stage.name) if stage.name in compared else len(compared))


def _sweep(folder: Path) -> Sweep:
    file = folder / SCALING
    if not file.is_file():
        raise Refused(str(folder), f"is a sweep without {SCALING}", "megapsft sweep ... --report-only writes it")
    content = _json(file, dict)
    return Sweep(name=folder.resolve().name, rows=content["points"], notes=content["notes"])


def _json(file: Path, kind: type) -> Any:
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise Refused(str(file), f"is not JSON ({error})", "let what wrote it write it again") from None
    if not isinstance(content, kind):
        raise Refused(str(file), f"holds no {kind.__name__}", REMEDY)
    return content


__all__ = ["Pipeline", "Shown", "Sweep", "names", "read_folders", "read_run"]
