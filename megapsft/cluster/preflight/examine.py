"""What one task of the step looks at: its node, if it is the first one there, and with all the others the network."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megapsft.cluster.preflight.finding import Finding, good
from megapsft.cluster.preflight.gpus import check_gpus
from megapsft.cluster.preflight.node import RUN_DISK, TEMPORARY_DISK, check_disk, check_ports, check_shared
from megapsft.cluster.preflight.packages import CHECK, installed
from megapsft.platform.launch import joined_world

ANSWER, ALL_REDUCE, PAIR = "answer", "all-reduce", "pair"


def examine_node(folder: Path, *, token: str, gpus: int, run_gib: float, temp_gib: float) -> Iterator[Finding]:
    """Findings of this node, as they come: where a check hangs, those before it have been told.

    Args:
        folder: of the checks, in that of the run; it holds the canary.
        token: what the canary says.
        gpus: that the node is to have.
        run_gib, temp_gib: that are to be free.
    """
    yield from (good(CHECK, f"{name} {version}") for name, version in installed().items())
    shared = check_shared(folder, token)
    yield shared
    if shared.good:  # else it is another disk
        yield check_disk(RUN_DISK, folder, run_gib)
    yield check_disk(TEMPORARY_DISK, Path(tempfile.gettempdir()), temp_gib)
    if os.environ.get("SLURM_PROCID", "0") == "0" and "SLURM_STEP_ID" in os.environ:
        yield check_ports(int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"]))
    yield from check_gpus(gpus)
    yield good(ANSWER, "has looked at everything")


def examine_network(check: str, *, gpus: int, megabytes: float, seconds: float) -> bool:
    """Print findings of this rank: of its GPU where that does not work, and of the first task of a node the all-reduce.

    Returns:
        whether all went well.
    """
    from megapsft.cluster.preflight.all_reduce import check_all_reduce, check_device

    first = os.environ.get("SLURM_LOCALID", "0") == "0"
    world = joined_world()
    if gpus and (wrong := check_device(int(os.environ.get("LOCAL_RANK", "0")))):
        tell(wrong)
        return False
    if world is None:
        tell(good(check, "one rank"))
        return True
    report = tell if first else lambda finding: None
    return check_all_reduce(check, world, on_gpus=gpus > 0, megabytes=megabytes, seconds=seconds, report=report)


def tell(finding: Finding) -> None:
    """To whoever collects what the step prints."""
    print(finding.line(), flush=True)
