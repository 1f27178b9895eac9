"""Ending the jobs of a run, and no others."""

from __future__ import annotations

from pathlib import Path

from megapsft.cluster.slurm import client, records
from megapsft.cluster.slurm.client import Job
from megapsft.train.stop import ask


def cancel(run: Path) -> list[Job]:
    """Cancel the jobs of the run that are not over; what they had since their last checkpoint is lost. Returns them.

    Raises:
        Refused: it was never submitted; Slurm does not answer, or refuses.
    """
    found = _alive(run)
    if found:
        client.cancel([job.id for job in found])
    return found


def stop(run: Path) -> list[Job]:
    """Ask the run to end after the step that it is in, saved; jobs of it that wait are cancelled. Returns both."""
    found = _alive(run)
    waiting = [job for job in found if job.state == "PENDING"]
    if len(waiting) < len(found):
        ask(run)
    if waiting:
        client.cancel([job.id for job in waiting])
    return found


def _alive(run: Path) -> list[Job]:
    """Those that Slurm knows by the name that they were given: numbers come again where a cluster is set up anew."""
    found = [(record, client.find(record.job)) for record in records.read(run)]
    return [job for record, job in found if not job.over and job.name == record.name]
