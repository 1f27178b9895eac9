"""Progress with bytes, rate and time left: a bar, or lines in the log of a job."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

SECONDS = 20.0  # between two lines


@contextlib.contextmanager
def open_progress(shown: bool, text: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A function that is called, by any thread, with bytes that were done: a bar on stderr, or where that is a file, lines."""
    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        lines = _Lines(text, total, done) if shown else None
        yield lines.advance if lines is not None else lambda nbytes: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), DownloadColumn(), TransferSpeedColumn(),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        task = progress.add_task(text, total=total, completed=done)
        yield lambda nbytes: progress.advance(task, nbytes)


class _Lines:
    """A line now and then, for the log of a job."""

    def __init__(self, text: str, total: int, done: int):
        self._text, self._total, self._done, self._before = text, total, done, done
        self._began = self._last = time.monotonic()
        self._lock = threading.Lock()

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            now = time.monotonic()
            if now - self._last < SECONDS:
                return
            self._last = now
            rate = (self._done - self._before) / (now - self._began)
            left = (self._total - self._done) / rate if rate else 0
            parts = f"{decimal(self._done)} of {decimal(self._total)}, {decimal(int(rate))}/s, {left:.0f} s left"
            print(f"{self._text}: {parts}", file=sys.stderr, flush=True)
