"""RUN/slurm/jobs.jsonl: the jobs that a run was submitted as, the last one last."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from megapsft.errors import Refused

FOLDER, FILE = "slurm", "jobs.jsonl"


@dataclass(frozen=True, kw_only=True)
class Record:
    """A job of a run."""

    job: str
    name: str = ""  # that Slurm knows it by
    submitted: str = ""  # ISO 8601, UTC
    script: str = ""
    log: str = ""  # of the batch shell


def folder(run: Path) -> Path:
    return run / FOLDER


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def append(run: Path, record: Record) -> None:
    """Add a job; a line of it is written at once, so that several may."""
    folder(run).mkdir(parents=True, exist_ok=True)
    line = (json.dumps(asdict(record)) + "\n").encode()
    file = os.open(folder(run) / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line)
    finally:
        os.close(file)


def read(run: Path) -> list[Record]:
    """The jobs of the run.

    Raises:
        Refused: it has none.
    """
    file = folder(run) / FILE
    if not file.is_file():
        raise Refused(str(run), f"has no {FOLDER}/{FILE}: it was not submitted as a job", "name the folder of a run that was")
    records: dict[str, Record] = {}
    for line in file.read_text().splitlines():
        told = json.loads(line)
        known = asdict(records[told["job"]]) if told["job"] in records else {}
        records[told["job"]] = Record(**(known | {key: value for key, value in told.items() if value}))
    return list(records.values())


def attempts(run: Path, job: str) -> list[Path]:
    """The folders of the job's logs, one a start, in order."""
    found = [path for path in folder(run).glob(f"{job}.*") if path.is_dir() and path.suffix[1:].isdigit()]
    return sorted(found, key=lambda path: int(path.suffix[1:]))
