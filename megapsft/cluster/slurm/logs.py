"""The logs of a run's job, what went wrong first."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from megapsft.cluster.slurm import client, records
from megapsft.cluster.slurm.failures import failures, last_lines
from megapsft.errors import Refused

POLL_SECONDS = 1.0


def logs(run: Path, *, job: str | None = None, rank: int | None = None, lines: int = 40) -> Iterator[str]:
    """The end of the logs of the last attempt: where a rank failed its own first, then the batch shell's; else rank 0's.

    Args:
        job: number of one of the run's jobs; default: the last.
        rank: only this one's.
        lines: of each.

    Raises:
        Refused: a run that was never submitted, another run's job, a rank that has no log.
    """
    record = _record(run, job)
    attempts = records.attempts(run, record.job)
    if rank is not None:
        yield from _titled(_log(attempts, rank, record.job), lines)
        return
    failed = failures(attempts[-1]) if attempts else []
    if failed:
        first = failed[0]
        yield f"rank {first.rank} on {first.host} {first.how}, before the others"
        yield from _titled(attempts[-1] / f"rank-{first.rank}.log", lines)
    elif attempts and (attempts[-1] / "rank-0.log").is_file():
        yield from _titled(attempts[-1] / "rank-0.log", lines)
    yield from _titled(Path(record.log), lines)


def follow(run: Path, *, job: str | None = None, rank: int | None = None) -> Iterator[str]:
    """Lines as they are written, of rank 0 or the one that is named, from its first, over all restarts; ends with the job."""
    record, rank = _record(run, job), rank or 0
    seen: dict[Path, int] = {}
    over = False
    while True:
        for attempt in records.attempts(run, record.job):
            log = attempt / f"rank-{rank}.log"
            if log.is_file():
                with log.open("rb") as file:
                    file.seek(seen.get(log, 0))
                    whole, newline, _ = file.read().rpartition(b"\n")
                seen[log] = seen.get(log, 0) + len(whole) + len(newline)
                yield from whole.decode(errors="replace").splitlines() if newline else ()
        if over:
            return
        over = client.find(record.job).over  # what it has written until then is read once more
        if not over:
            time.sleep(POLL_SECONDS)


def _record(run: Path, job: str | None) -> records.Record:
    told = {record.job: record for record in records.read(run)}
    if job is not None and job not in told:
        raise Refused(f"--job {job}", f"is no job of {run}", "use one of " + ", ".join(told))
    return told[job] if job is not None else list(told.values())[-1]


def _log(attempts: list[Path], rank: int, job: str) -> Path:
    for attempt in reversed(attempts):
        if (attempt / f"rank-{rank}.log").is_file():
            return attempt / f"rank-{rank}.log"
    raise Refused(f"--rank {rank}", f"has no log of job {job}", "wait until it has started, or name another")


def _titled(log: Path, lines: int) -> Iterator[str]:
    found = last_lines(log, lines)
    if found:
        yield f"== {log}"
        yield from found
