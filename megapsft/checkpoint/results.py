"""What a checkpoint's writers, which are forked, report to the process that saves.

Megatron would start a process to hold the queue, which imports PyTorch to hold what is in it: seconds of every run's first save.
"""

from __future__ import annotations

import queue
import threading
from multiprocessing import get_context
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

SECONDS = 60.0  # to read what a writer that has ended left in the pipe


class Results:
    """The part of a queue of `multiprocessing` that Megatron uses: a pipe, which a thread of the saving process empties."""

    def __init__(self) -> None:
        self._pipe, self._arrived = get_context("fork").SimpleQueue(), queue.SimpleQueue()
        threading.Thread(target=self._read, name="checkpoint-results", daemon=True).start()

    def put(self, result: Any) -> None:
        """In a writer, or in the saving process: waits while the pipe is full."""
        self._pipe.put(result)

    def get_nowait(self) -> Any:
        """In the saving process, once the writer has ended.

        Raises:
            queue.Empty: it ended without a word.
        """
        return self._arrived.get(timeout=SECONDS)

    def _read(self) -> None:
        while True:
            self._arrived.put(self._pipe.get())


def report_by_pipe() -> None:
    """Let the writers of all checkpoints that this process saves from here on report through `Results`."""
    filesystem_async._results_queue = Results()
