"""A progress bar with bytes, rate and time left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextlib.contextmanager
def open_progress(shown: bool, text: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A function that is called, by any thread, with bytes that were done; drawn on stderr, and only where that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), DownloadColumn(), TransferSpeedColumn(),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal), refresh_per_second=4) as progress:
        task = progress.add_task(text, total=total, completed=done)
        yield lambda nbytes: progress.advance(task, nbytes)
