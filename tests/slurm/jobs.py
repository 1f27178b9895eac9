"""Jobs of a test: submitted, followed through the queue, cancelled when the test is over. A deadline that passes says why."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from tests.slurm.cluster import Cluster, tail, wait_until

ROOT = Path(__file__).resolve().parents[2]
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
PYTHON = f"PYTHONPATH={ROOT} {sys.executable}"  # in the script of a job


class Jobs:
    """Those that a test submits, or is told of.

    Args:
        cluster: that is up.
        folder: for scripts, and logs where none are named.
    """

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder = cluster, folder
        self._mine: list[int] = []

    def submit(self, body: str, *options: str, seconds: int = 300) -> int:
        """The id of a job of a Bash script, run from the repository's root; its log is `log(id)`.

        Args:
            options: of sbatch.
            seconds: time limit, in whole minutes for Slurm.
        """
        script = self.folder / f"job-{len(self._mine)}.sh"
        script.write_text(f"#!/bin/bash\nset -euo pipefail\n{body}\n")
        limit = f"--time={-(-seconds // 60)}"
        output = f"--output={self.folder}/%j.log"
        return self.sbatch("--open-mode=append", output, limit, f"--chdir={ROOT}", *options, str(script))

    def sbatch(self, *arguments: str) -> int:
        """The id of a job that sbatch with these arguments makes."""
        return self.adopt(int(self.cluster.slurm("sbatch", "--parsable", *arguments).split(";")[0]))

    def adopt(self, job: int) -> int:
        """Cancel this one too when the test is over."""
        self._mine.append(job)
        return job

    def cancel(self) -> None:
        """All that were submitted or adopted."""
        if self._mine:
            self.cluster.slurm("scancel", "--quiet", *map(str, self._mine), check=False)

    def show(self, job: int) -> dict[str, str]:
        """What `scontrol show job` says of it: JobState, Restarts, NodeList, ExitCode, Reason, StdOut, ..."""
        shown = self.cluster.slurm("scontrol", "--oneliner", "show", "job", str(job))
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def log(self, job: int) -> Path:
        """What the job printed."""
        return Path(self.show(job)["StdOut"])

    def wait(self, job: int, until: Callable[[dict[str, str]], object] | None = None, seconds: float = 180) -> dict[str, str]:
        """What Slurm says of the job once `until` holds of that; default: once it is over.

        Raises:
            TimeoutError: it did not; with the job's log and the controller's last lines.
        """
        holds = until or (lambda shown: shown["JobState"] in OVER)
        wait_until(lambda: holds(self.show(job)), seconds, lambda: self.why(job))
        return self.show(job)

    def wait_for(self, condition: Callable[[], object], job: int, seconds: float = 180) -> None:
        """Until something that the job is to do has been done."""
        wait_until(condition, seconds, lambda: self.why(job))

    def completes(self, job: int, seconds: float = 180) -> dict[str, str]:
        """What Slurm says of it when it has ended well.

        Raises:
            AssertionError, TimeoutError: it did not.
        """
        shown = self.wait(job, seconds=seconds)
        assert (shown["JobState"], shown["ExitCode"]) == ("COMPLETED", "0:0"), self.why(job)
        return shown

    def why(self, job: int) -> str:
        """All that helps to see what went wrong with it."""
        shown = self.cluster.slurm("scontrol", "show", "job", str(job), check=False)
        queue = self.cluster.slurm("squeue", check=False)
        logs = (self.log(job), self.cluster.controller_log)
        return "\n".join([shown, queue, *(f"{log}:\n{tail(log)}" for log in logs)])


def ranks_of(cluster: Cluster, node: str, job: int) -> dict[int, int]:
    """Rank -> process id, as this machine numbers them, of the tasks of the job's steps on the node: Python, no shells."""
    found = {}
    for process in cluster.processes(node):
        try:
            environment = dict(
                entry.split("=", 1) for entry in Path(f"/proc/{process}/environ").read_text().split("\0") if "=" in entry
            )
            program = Path(os.readlink(f"/proc/{process}/exe")).name
        except OSError:  # it has ended
            continue
        if environment.get("SLURM_JOB_ID") == str(job) and "SLURM_PROCID" in environment and program.startswith("python"):
            found.setdefault(int(environment["SLURM_PROCID"]), process)  # the first of each: what it starts comes later
    return found
