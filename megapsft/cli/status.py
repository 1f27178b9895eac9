"""megapsft status: how far a run is, and what became of its jobs."""

from __future__ import annotations

from pathlib import Path

import tyro


def status(run: tyro.conf.Positional[Path], *, json: bool = False) -> int:
    """Say how far a run is that was submitted, and what Slurm says of its jobs.

    For example:
        megapsft status runs/psft-qwen3-30b-a3b
        megapsft status runs/psft-qwen3-30b-a3b --json

    Args:
        run: the run's folder.
        json: print it as JSON.
    """
    from json import dumps

    from rich.console import Console

    from megapsft.cluster.slurm.status import job_table, progress_lines
    from megapsft.cluster.slurm.status import status as look

    found = look(run)
    if json:
        print(dumps(found.as_dict(), indent=1))
        return 0
    Console().print(job_table(found))
    print("\n".join(progress_lines(found)))
    return 0
