"""An all-reduce of a few megabytes over all ranks, with a deadline: whether they reach one another, and how fast."""

from __future__ import annotations

import datetime
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megapsft.cluster.preflight.finding import Finding, bad, good

REPEATS = 5
REMEDY = "see its network: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME, cables, firewall; NCCL_DEBUG=INFO says more"


def check_device(local_rank: int) -> Finding | None:
    """Nothing where this rank's GPU computes; what it says instead of that."""
    try:
        torch.cuda.set_device(local_rank)
        torch.ones(8, device="cuda").sum().item()
    except (RuntimeError, AssertionError) as error:
        return bad("device", f"GPU {local_rank}: {_first_line(error)}", "must compute", "see its driver, and dmesg")
    return None


def check_all_reduce(
    check: str, world: int, *, on_gpus: bool, megabytes: float, seconds: float, report: Callable[[Finding], None]
) -> bool:
    """Sum over all ranks of torch's environment, checked and timed; whether it came out right.

    What was found is reported, also where the deadline passes in the middle of it: then the process ends, with exit code 1.

    Args:
        check: its name.
        world: number of ranks.
        on_gpus: NCCL, instead of gloo on CPUs.
        seconds: from now until all is done; ranks that are started late are waited for in them.
        report: takes the one finding.
    """
    with _deadline(seconds, lambda: report(_failed(check, world, f"not done after {seconds:g} s"))):
        try:
            took = _all_reduce(on_gpus, int(megabytes * 2**20), seconds)
        except (RuntimeError, ValueError) as error:
            report(_failed(check, world, _first_line(error)))
            return False
    speed = 2 * (world - 1) / world * megabytes * 2**20 / took
    report(good(check, f"{megabytes:g} MiB over {world} ranks in {1e3 * took:.1f} ms, {speed / 1e9:.2f} GB/s"))
    return True


def _all_reduce(on_gpus: bool, nbytes: int, seconds: float) -> float:
    """Median of seconds that one takes.

    Raises:
        RuntimeError: not reached, or another sum than it should be.
    """
    dist.init_process_group("nccl" if on_gpus else "gloo", timeout=datetime.timedelta(seconds=seconds))
    try:
        return _repeated(on_gpus, nbytes)
    finally:
        dist.destroy_process_group()  # or its threads, which hold tensors, outlive the interpreter: SIGABRT


def _repeated(on_gpus: bool, nbytes: int) -> float:
    rank, world, times = dist.get_rank(), dist.get_world_size(), []
    for _ in range(1 + REPEATS):  # the first makes the connections
        values = torch.full((nbytes // 4,), float(rank + 1), device="cuda" if on_gpus else "cpu")
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(values)
        low, high = values.min().item(), values.max().item()  # waits for the GPU
        times.append(time.perf_counter() - start)
        wanted = world * (world + 1) / 2
        if not low == high == wanted:
            raise RuntimeError(f"gives {low:g} ... {high:g} instead of {wanted:g}")
    dist.barrier()  # the first rank, which has the store, does not leave before the others
    return statistics.median(times[1:])


@contextmanager
def _deadline(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """What is within may hang in C code, which no exception ends: `act`, then the end of the process."""

    def end() -> None:
        act()
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _failed(check: str, world: int, value: str) -> Finding:
    return bad(check, value, f"must reach all {world} ranks in time", REMEDY)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
