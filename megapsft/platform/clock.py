"""Where the time of a step goes: its parts, clocked on this rank, each also a range of that name in a profile."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar

from megapsft.platform.cpu import has_cuda
from megapsft.platform.ranges import span

_listening: ContextVar[Clock | None] = ContextVar("clock", default=None)  # threads inherit none: they work beside the step


class Clock:
    """Seconds by part on the wall of this rank. A part inside another is not counted for itself: seconds add up.

    Example:
        >>> clock = Clock()
        >>> clock.listen()
        >>> with part("optimizer"):
        ...     step()
        >>> clock.take()
        {'optimizer': 0.31}
    """

    def __init__(self) -> None:
        self.inside = False  # a part
        self._seconds: dict[str, float] = {}

    def listen(self) -> None:
        """Take in what `part` clocks in this thread from now on; another clock hears nothing more."""
        _listening.set(self)

    def add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Seconds since they were taken last, of parts that there were."""
        taken, self._seconds = self._seconds, {}
        return taken


@contextlib.contextmanager
def part(name: str, *, wait: bool = False) -> Iterator[None]:
    """The body as a part of the step, of `megapsft.metrics.names.PARTS`.

    Args:
        wait: at its end for the device, which may be behind. For parts that do not end by reading a number from it, and that a
            step has once or twice: waiting more often would leave the device idle.
    """
    clock = _listening.get()
    with span(name):
        if clock is None or clock.inside:
            yield
            return
        begin, clock.inside = time.perf_counter(), True
        try:
            yield
            if wait and has_cuda():
                import torch

                torch.cuda.synchronize()
        finally:
            clock.inside = False
            clock.add(name, time.perf_counter() - begin)


__all__ = ["Clock", "part"]
