"""megapsft cancel: the end of a run's jobs."""

from __future__ import annotations

from pathlib import Path

import tyro


def cancel(run: tyro.conf.Positional[Path], *, save: bool = False) -> int:
    """Cancel the jobs of a run, and no others.

    For example:
        megapsft cancel runs/psft-qwen3-30b-a3b
        megapsft cancel runs/psft-qwen3-30b-a3b --save

    Args:
        run: the run's folder.
        save: let it end the step that it is in and save it first; jobs that wait are cancelled at once.
    """
    from megapsft.cluster.slurm.cancel import cancel as end
    from megapsft.cluster.slurm.cancel import stop

    found = stop(run) if save else end(run)
    for job in found:
        running = save and job.state != "PENDING"
        print(f"job {job.id}: " + ("ends after its step, saved" if running else "cancelled"))
    if not found:
        print(f"{run}: no job of it waits or runs")
    return 0
