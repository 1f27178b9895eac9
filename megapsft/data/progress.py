"""How many rows of a large file came so far, for who waits: a file of thousands takes seconds, one of millions minutes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

QUIET = 2.0  # seconds in which nothing is shown
REFRESH = 0.25  # seconds between two states of the bar
BETWEEN = 20.0  # seconds between two lines, where stderr is the log of a job

T = TypeVar("T")


@contextmanager
def watched(rows: Iterable[T], text: str, total: int | None = None) -> Iterator[Iterator[T]]:
    """The rows as they are; on the first rank's stderr a bar that goes away when the block ends, or where that is a file, lines.

    Args:
        text: before the numbers, such as "data.jsonl: tokenised".
        total: how many there will be, where that is known.
    """
    if os.environ.get("RANK", "0") != "0":
        yield iter(rows)
        return
    console = Console(stderr=True)
    if not console.is_interactive:
        yield _with_lines(rows, text, "" if total is None else f" of {total:,}")
        return
    columns = (BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(TextColumn("{task.description}"), *columns, console=console, transient=True)
    bar.add_task(text, total=total)
    try:
        yield _with_bar(rows, bar)
    finally:
        if bar.live.is_started:
            bar.stop()


def _with_bar(rows: Iterable[T], bar: Progress) -> Iterator[T]:
    due = time.monotonic() + QUIET
    for done, row in enumerate(rows, start=1):
        yield row
        if time.monotonic() >= due:
            bar.start()  # where it was started, nothing happens
            bar.update(bar.task_ids[0], completed=done)
            due = time.monotonic() + REFRESH


def _with_lines(rows: Iterable[T], text: str, of: str) -> Iterator[T]:
    due = time.monotonic() + BETWEEN
    for done, row in enumerate(rows, start=1):
        yield row
        if time.monotonic() >= due:
            print(f"{text} {done:,}{of} rows", file=sys.stderr, flush=True)
            due = time.monotonic() + BETWEEN


__all__ = ["watched"]
