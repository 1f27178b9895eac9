"""Seconds and bytes on the device that is measured, a GPU or (at tiny sizes) the CPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch


class Device:
    """Where everything runs; on a CPU the same calls do the same work, so that the code has run before a GPU sees it."""

    def __init__(self, kind: str):
        self.kind = kind
        self.torch = torch.device(kind)

    def synchronize(self) -> None:
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], repeats: int, warm_up: int = 1, at_once: int = 1) -> list[float]:
        """Of one call each, on the clock of the wall between two points where the device has nothing left to do.

        Args:
            at_once: so many calls between these points, for calls that are short beside what launching and waiting take.
        """
        for _ in range(warm_up):
            run()
        return [self.once(lambda: [run() for _ in range(at_once)]) / at_once for _ in range(repeats)]

    def once(self, run: Callable[[], object]) -> float:
        """Seconds of one call."""
        self.synchronize()
        begin = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - begin

    def free(self) -> None:
        """Give back what nothing holds any more."""
        gc.collect()
        if self.kind == "cuda":
            torch.cuda.empty_cache()

    def forget_peak(self) -> None:
        self.synchronize()
        if self.kind == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def held(self) -> int:
        """Bytes: allocated by torch on a GPU, resident on a CPU."""
        return torch.cuda.memory_allocated() if self.kind == "cuda" else _resident("VmRSS")

    def peak(self) -> int:
        """The most that was held since `forget_peak`."""
        self.synchronize()
        return torch.cuda.max_memory_allocated() if self.kind == "cuda" else _resident("VmHWM")

    def grown_by(self, run: Callable[[], object]) -> int:
        """Bytes that one call held at most, beyond what was held before it."""
        self.free()
        self.forget_peak()
        before = self.held()
        result = run()  # what it returns counts
        grown = self.peak() - before
        del result
        return max(0, grown)


def _resident(field: str) -> int:
    """Bytes of `field` of this process's status, VmRSS or VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
