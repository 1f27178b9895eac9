"""How far a run is, and what became of its jobs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.table import Table

from megapsft.cluster.slurm import client, records
from megapsft.cluster.slurm.client import Job
from megapsft.cluster.slurm.failures import Failure, failures
from megapsft.config import load_config
from megapsft.metrics.records import read_records
from megapsft.train.stop import MARKER


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What the files of a run say."""

    steps: int  # that are done
    of: int | None  # None: it has not begun
    seconds: float | None = None  # of a step, the median of the last 20
    last: dict[str, Any] | None = None  # record of the last step
    checkpoint: str | None = None  # that it would go on from
    stopped: dict[str, Any] | None = None  # why, where it was stopped on purpose

    @property
    def finished(self) -> bool:
        return self.of is not None and self.steps >= self.of


@dataclass(frozen=True, kw_only=True)
class Status:
    run: Path
    jobs: Sequence[Job]
    progress: Progress
    failure: Failure | None  # of the last attempt
    attempt: Path | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        told = {"run": str(self.run), "jobs": [vars(job) for job in self.jobs], "progress": vars(self.progress)}
        return told | {"finished": self.progress.finished, "failure": self.failure and vars(self.failure)}


def progress(run: Path) -> Progress:
    """Of any run, submitted or not."""
    if not (run / "config.yaml").is_file():
        return Progress(steps=0, of=None)
    train = load_config(run / "config.yaml").train
    done = read_records(run / "steps.jsonl") if (run / "steps.jsonl").is_file() else []
    latest = run / "checkpoints" / "latest"
    marker = run / MARKER
    return Progress(
        steps=len(done),
        of=train.steps + train.sft_warmup_steps,
        seconds=median(record["perf/seconds"] for record in done[-20:]) if done else None,
        last=done[-1] if done else None,
        checkpoint=latest.readlink().name if latest.is_symlink() else None,
        stopped=json.loads(marker.read_text()) if marker.is_file() else None,
    )


def status(run: Path) -> Status:
    """Of a run that was submitted.

    Raises:
        Refused: it was not; Slurm does not answer.
    """
    told = records.read(run)
    attempts = records.attempts(run, told[-1].job)
    failed = failures(attempts[-1]) if attempts else []
    return Status(
        run=run,
        jobs=[_job(record) for record in told],
        progress=progress(run),
        failure=failed[0] if failed else None,
        attempt=attempts[-1] if attempts else None,
    )


def _job(record: records.Record) -> Job:
    """What Slurm says; numbers come again where a cluster is set up anew, and then the name is another."""
    job = client.find(record.job)
    if record.name and job.name and job.name != record.name:
        return Job(id=record.job, state="GONE", reason="its number is another job's now", name=record.name)
    return job


def job_table(found: Status) -> Table:
    """For the terminal."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("job", "state", "why", "nodes", "elapsed", "limit", "restarts"):
        table.add_column(heading, overflow="fold")
    for job in found.jobs:
        table.add_row(job.id, job.state, job.reason, job.nodes, job.elapsed, job.limit, str(job.restarts))
    return table


def progress_lines(found: Status) -> list[str]:
    """The rest of it, in words."""
    now = found.progress
    if now.of is None:
        lines = [f"{found.run}: has not begun"]
    else:
        lines = [f"{found.run}: {now.steps} of {now.of} steps"]
        if now.seconds is not None:
            left = (now.of - now.steps) * now.seconds
            lines[0] += f", {now.seconds:.2f} s each" + (f", {_duration(left)} left" if left > 0 else "")
        if now.last is not None:
            shown = ("train/loss", "objective/clip_fraction", "policy/entropy", "reward/mean", "perf/tokens_per_second")
            values = [f"{key} {now.last[key]:.4g}" for key in shown if now.last.get(key) is not None]
            lines.append("last step: " + ", ".join(values))
        if now.checkpoint:
            lines.append(f"checkpoint: {now.checkpoint}")
    if now.stopped:
        lines.append(f"stopped after step {now.stopped['step']} ({now.stopped['reason']}), to be continued")
    if found.failure:
        failed = found.failure
        lines.append(f"rank {failed.rank} on {failed.host} {failed.how}: megapsft logs {found.run}")
    return lines


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else f"{seconds:.0f} s"
