"""megapsft logs: the logs of a run's job."""

from __future__ import annotations

from pathlib import Path

import tyro

from megapsft.errors import Refused


def logs(
    run: tyro.conf.Positional[Path],
    *,
    job: str | None = None,
    rank: int | None = None,
    lines: int = 40,
    follow: bool = False,
) -> int:
    """Print the end of the logs of a run's last job: the rank that failed first, then the batch script.

    For example:
        megapsft logs runs/psft-qwen3-30b-a3b
        megapsft logs runs/psft-qwen3-30b-a3b --rank 17 --lines 200
        megapsft logs runs/psft-qwen3-30b-a3b --follow

    Args:
        run: the run's folder.
        job: number of one of its jobs; default: the last.
        rank: only this one's log.
        lines: of each log.
        follow: print rank 0's log, or that of --rank, as it is written, until the job is over.
    """
    from megapsft.cluster.slurm.logs import follow as follow_lines
    from megapsft.cluster.slurm.logs import logs as end_of

    if lines < 1:
        raise Refused(f"--lines {lines}", "must be 1 or more", "leave it out for 40")
    for line in follow_lines(run, job=job, rank=rank) if follow else end_of(run, job=job, rank=rank, lines=lines):
        print(line, flush=True)
    return 0
