"""Threads that go through tensors, a window of rows at a time, in bounded memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from megapsft.checkpoint.convert import memory
from megapsft.checkpoint.convert.progress import open_progress
from megapsft.checkpoint.files.direct import Buffers
from megapsft.checkpoint.weights import Stored, Weights

Progress = Callable[[int], None]  # called with bytes that were done
Work = Callable[[str, int, Buffers, Progress], None]  # (tensor, bytes of a window, this thread's memory, progress)
LARGE = 2**28  # bytes: such tensors come first, so that at the end no thread is left alone with one


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to convert, whatever the direction."""

    max_memory: int | None = None  # bytes that the process may have; None: 600 MiB, or 256 MiB more than a large one has
    workers: int = 4
    progress: bool = True
    direct: bool = True  # past the page cache, where the file system allows
    dry_run: bool = False  # check everything, write nothing
    read_back: bool = False  # read what was written, and compare it
    sync_every: float = 5.0  # seconds after which what is written is made safe, and need not be done again


def each(work: Work, tensors: dict[str, Stored], copies: int, text: str, options: Options, done: int = 0) -> None:
    """Do `work` for every tensor. Its first error is raised when the tensors that are under way are finished.

    Args:
        copies: windows that a worker holds at once.
        text: beside the progress bar.
        done: bytes that were done before.

    Raises:
        Refused: the memory does not allow one worker.
    """
    largest = max((stored.row_bytes for stored in tensors.values()), default=1)
    budget = memory.plan(options.max_memory, options.workers, copies, largest)
    total = sum(stored.nbytes for stored in tensors.values())
    buffers = Buffers()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_one_thread_each())
        progress = stack.enter_context(open_progress(options.progress, text, total + done, done))
        pool = stack.enter_context(ThreadPoolExecutor(budget.workers, thread_name_prefix="convert"))
        names = sorted(tensors, key=lambda name: tensors[name].nbytes <= LARGE)
        running = [pool.submit(work, name, budget.window, buffers, progress) for name in names]
        try:
            for future in running:
                future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def windows(stored: Stored, window: int) -> Iterator[tuple[int, int]]:
    """(first row, last row + 1) of parts of a tensor that have at most `window` bytes, or one row."""
    step = memory.rows_per_window(window, stored.row_bytes)
    for start in range(0, stored.rows, step):
        yield start, min(start + step, stored.rows)


def read_rows(weights: Weights, name: str, start: int, stop: int, buffers: Buffers) -> Tensor:
    """[stop - start, *row shape], in this thread's memory."""
    stored = weights.tensors[name]
    content = buffers.take((stop - start) * stored.row_bytes)
    rows = content.view(stored.dtype).view(stop - start, *stored.row_shape)
    weights.read(name, start, stop, rows)
    return rows


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """The workers are the threads; torch's own would only stand in their way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
