"""One process or many: join torchrun or srun where they started us, else start torchrun, or be a world of one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import sys
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from megapsft.errors import Refused

LAUNCHED = "MEGAPSFT_LAUNCHER"  # environment variable: process id of the launcher


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
    port = rendezvous_port(int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"]))
    environment.setdefault("MASTER_PORT", str(port))
    return int(environment["WORLD_SIZE"])


def rendezvous_port(job: int, step: int) -> int:
    """Where the ranks of a job step of Slurm meet: the same on all, another for each step, outside the ephemeral ports."""
    return 20000 + (job * 31 + step) % 12000


def _stay_on_loopback() -> None:
    """All ranks are on this machine: gloo need not listen on its other interfaces, nor resolve its name."""
    if sys.platform.startswith("linux"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


@contextlib.contextmanager
def _stores_on_loopback() -> Iterator[None]:
    """The stores through which ranks of this machine meet; torch's own listen on every interface of the machine."""
    import torch.distributed as dist
    from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend as backend

    class OnLoopback(dist.TCPStore):
        def __init__(self, host_name: str, port: int, world_size: int | None = None, is_master: bool = False, **options: Any):
            if is_master:
                listening = socket.create_server(("127.0.0.1", port))
                host_name, port = listening.getsockname()
                options["master_listen_fd"] = listening.detach()
            super().__init__(host_name, port, world_size, is_master, **options)

    own = dist.TCPStore
    dist.TCPStore = backend.TCPStore = OnLoopback
    try:
        yield
    finally:
        dist.TCPStore = backend.TCPStore = own


def die_with_launcher() -> None:
    """In a rank that `torchrun` above started: be killed when that process ends, however it ends (Linux)."""
    launcher = os.environ.get(LAUNCHED)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(launcher):  # it was gone before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def _first_host(nodelist: str) -> str:
    """The first host of Slurm's list: `node[07-09,12]-ib,other` -> node07-ib."""
    match = re.match(r"([^,\[]+)(?:\[([^,\]-]+)[^\]]*\]([^,\[]*))?", nodelist)
    if match is None:
        raise Refused(f"SLURM_STEP_NODELIST={nodelist!r}", "names no host", "set MASTER_ADDR")
    return "".join(part or "" for part in match.groups())


def become_world_of_one() -> None:
    """Set torch's environment for a single process, on the loopback interface."""
    _stay_on_loopback()
    # port 0: one that is free when it is bound; of one that was found free before, another program may have become the owner
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


def torchrun(processes: int, arguments: Sequence[str]) -> int:
    """Run `megapsft <arguments>` as ranks on this machine, as torchrun would; returns the exit code of the first that failed.

    The ranks die with this process, also where it is killed: two worlds in one run.dir would spoil it.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ[LAUNCHED] = str(os.getpid())
    _stay_on_loopback()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
        max_restarts=0,
    )
    try:
        with _stores_on_loopback():
            elastic_launch(config, sys.executable)("-u", "-m", "megapsft.cli", *arguments)
    except ChildFailedError as error:  # the rank itself has said why
        return abs(error.get_first_failure()[1].exitcode) or 1
    return 0

