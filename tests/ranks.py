"""Real multi-process runs, cheaply: ranks are forked from a process that has imported torch and megatron already.

Each call makes fresh processes, a fresh process group (gloo) and fresh Megatron groups; only the imports are shared.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of OpenMP do not survive a fork
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 4
_ports = itertools.cycle(random.Random().sample(range(10000 + 2000 * _worker, 12000 + 2000 * _worker), 2000))


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, seconds: float = 300) -> list[Any]:
    """Call `function(*args)` on `world_size` processes with torchrun's environment; what they returned, by rank.

    Raises:
        RuntimeError: a rank failed (with what it printed), or the time ran out.
    """
    import torch

    import megapsft  # noqa: F401  the hook must be there before megatron is

    import megatron.core.models.gpt.gpt_model  # isort: skip  # imported once here, not once a rank
    import megatron.core.dist_checkpointing  # isort: skip  # noqa: F401

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        port, children = _free_port(), {}
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(world_size):
            with warnings.catch_warnings():  # Python 3.12 warns of any thread; those here are of tokenizers, which knows of forks
                warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
                pid = os.fork()
            if pid == 0:
                _child(rank, world_size, port, Path(folder), function, args)
            children[pid] = rank
        failed = _wait(children, time.monotonic() + seconds)
        logs = {rank: (Path(folder) / f"{rank}.log").read_text() for rank in range(world_size)}
        if failed is not None:
            raise RuntimeError(f"rank {failed[0]} {failed[1]}:\n{logs[failed[0]][-6000:]}")
        return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(world_size)]


def _child(rank: int, world_size: int, port: int, folder: Path, function: Callable[..., Any], args: tuple) -> None:
    os.setpgid(0, 0)  # helpers of a checkpoint's writer are killed with it
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    status = 1
    try:
        result = function(*args)
        (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(children: dict[int, int], deadline: float) -> tuple[int, str] | None:
    """Reap all ranks; the first that failed and how, after which the others are killed."""
    living, failed = dict(children), None
    while living:
        time.sleep(0.01)
        for pid in list(living):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                rank = living.pop(pid)
                with contextlib.suppress(ProcessLookupError):  # the writers of checkpoints that it leaves behind
                    os.killpg(pid, signal.SIGKILL)
                if status and failed is None:
                    failed, deadline = (rank, f"failed (status {status})"), time.monotonic() + 2
        if time.monotonic() > deadline and living:
            failed = failed or (min(living.values()), "ran out of time")
            for pid in living:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            living.clear()
    return failed


def _free_port() -> int:
    """Each worker of pytest has ports of its own, below those of outgoing connections, one of which may be made at any time."""
    for port in _ports:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port is free")
