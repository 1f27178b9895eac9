"""Slurm's commands, as lists of arguments: no shell reads them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megapsft.errors import Refused

SECONDS = 60.0  # a controller that is busy answers late
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED"}
FIELD = re.compile(r"(?:^|\s)([A-Za-z_/:]+)=")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What Slurm says of a job."""

    id: str
    state: str  # PENDING, RUNNING, ...; GONE where Slurm has forgotten it
    reason: str = ""  # why it waits
    name: str = ""
    nodes: str = ""
    elapsed: str = ""
    limit: str = ""
    restarts: int = 0
    exit_code: str = ""  # code:signal
    comment: str = ""

    @property
    def over(self) -> bool:
        return self.state in OVER or self.state == "GONE"


def call(arguments: Sequence[str], accept: Sequence[int] = (0,)) -> str:
    """The standard output of a command of Slurm.

    Raises:
        Refused: it is not installed, does not answer, or refuses, in its own words.
    """
    if shutil.which(arguments[0]) is None:
        raise Refused(arguments[0], "is not here", "use a machine from which jobs are submitted, or --dry-run")
    try:
        done = subprocess.run(list(arguments), capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise Refused(" ".join(arguments), f"did not answer within {SECONDS:g} s", "see `scontrol ping`") from None
    if done.returncode not in accept:
        said = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise Refused(" ".join(arguments), said, "see the manual of " + arguments[0])
    return done.stdout


def submit(script: Path, options: Sequence[str] = ()) -> str:
    """The number of the job that the script has become."""
    return call(["sbatch", "--parsable", *options, str(script)]).strip().split(";")[0]


def find(number: str) -> Job:
    """The job of this number, also a while after its end."""
    try:
        text = call(["scontrol", "show", "job", "--oneliner", number])
    except Refused as error:
        if "Invalid job id" in error.rule:
            return _of_accounting(number)
        raise
    return _parsed(text.splitlines()[0])


def _parsed(line: str) -> Job:
    """One line of `scontrol show job`: Key=value Key=value ..., whose values may hold spaces."""
    keys = list(FIELD.finditer(line))
    ends = [*(key.start() for key in keys[1:]), len(line)]
    said = {key[1]: line[key.end() : end].strip() for key, end in zip(keys, ends, strict=True)}
    reason = said.get("Reason", "None")
    return Job(
        id=said["JobId"],
        state=said.get("JobState", "?"),
        reason="" if reason == "None" else reason,
        name=said.get("JobName", ""),
        nodes={"(null)": ""}.get(said.get("NodeList", ""), said.get("NodeList", "")),
        elapsed=said.get("RunTime", ""),
        limit=said.get("TimeLimit", ""),
        restarts=int(said.get("Restarts", "0")),
        exit_code=said.get("ExitCode", ""),
        comment=said.get("Comment", ""),
    )


def _of_accounting(number: str) -> Job:
    """From sacct, where the cluster keeps books."""
    if shutil.which("sacct") is not None:
        fields = "JobID,State,JobName,NodeList,Elapsed,Timelimit,ExitCode"
        try:
            text = call(["sacct", "--noheader", "--parsable2", "--allocations", "--jobs", number, "--format", fields])
        except Refused:
            text = ""
        if text.strip():
            job, state, name, nodes, elapsed, limit, code = text.strip().splitlines()[-1].split("|")
            state = state.split()[0]
            return Job(id=job, state=state, name=name, nodes=nodes, elapsed=elapsed, limit=limit, exit_code=code)
    return Job(id=number, state="GONE", reason="Slurm has forgotten it")


def cancel(numbers: Sequence[str]) -> None:
    call(["scancel", *numbers])


__all__ = ["Job", "call", "cancel", "find", "submit"]
