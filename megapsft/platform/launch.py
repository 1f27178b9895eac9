"""One process or many: join torchrun or srun where they started us, else start torchrun, or be a world of one."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence

from megapsft.errors import Refused


def joined_world() -> int | None:
    """World size where torchrun or srun started this process (its environment is completed for torch), else None."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if "SLURM_PROCID" not in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return None
    environment = os.environ
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment.setdefault("MASTER_ADDR", _first_host(environment["SLURM_STEP_NODELIST"]))
    # the same on all ranks, another for each job step, outside the ephemeral ports
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    environment.setdefault("MASTER_PORT", str(20000 + (job * 31 + step) % 12000))
    return int(environment["WORLD_SIZE"])


def _first_host(nodelist: str) -> str:
    """The first host of Slurm's list: `node[07-09,12],other` -> node07."""
    match = re.match(r"([^,\[]+)(?:\[([^,\]-]+))?", nodelist)
    if match is None:
        raise Refused(f"SLURM_STEP_NODELIST={nodelist!r}", "names no host", "set MASTER_ADDR")
    return match.group(1) + (match.group(2) or "")


def become_world_of_one() -> None:
    """Set torch's environment for a single process, on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def torchrun(processes: int, arguments: Sequence[str]) -> int:
    """Run `megapsft <arguments>` as `processes` ranks on this machine; returns the exit code."""
    environment = dict(os.environ)
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run([*command, "-m", "megapsft.cli", *arguments], env=environment, check=False).returncode
