"""Worker processes that calls are dealt out to, each within its time and its memory."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megapsft.errors import Refused
from megapsft.rewards._process import Outcome, Process


class Pool:
    """`workers` processes, started when they are first needed, replaced when they end, and ended by `close`.

    Each belongs to a thread of this process that writes, waits and kills: any number of threads may call `map` at once. A call
    that is late or whose process ends costs a new process (a second for math-verify) and nothing of the others. Workers do not
    outlive this process, however it ends (Linux).
    """

    def __init__(self, workers: int = 2, memory_bytes: int = 1 << 30):
        """`memory_bytes`: of address space for each worker, beyond what its imports take."""
        if workers < 1:
            raise Refused(f"workers={workers}", "must be 1 or more", "use as many as there are cores to spare")
        if memory_bytes < 1 << 26:
            raise Refused(f"memory_bytes={memory_bytes}", "must be 64 MiB or more", "the default is 1 GiB")
        self._memory_bytes = memory_bytes
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="rewards")
        self._own = threading.local()
        self._processes: list[Process] = []
        self._closed = threading.Event()
        self._end = weakref.finalize(self, _end, os.getpid(), self._closed, self._processes, self._threads)

    def map(
        self, target: str, calls: Sequence[Sequence[Any]], seconds: float, options: Mapping[str, Any] | None = None
    ) -> list[Outcome]:
        """`target(*arguments, **options)` of each call, in their order, each within so many seconds.

        Args:
            target: `package.module:function` or `folder/file.py:function`; it returns a finite number.
            calls: of each the arguments, JSON.

        Raises:
            Refused: the target cannot be loaded, or arguments are not JSON.
            RuntimeError: the pool is closed.
        """
        return list(self._threads.map(lambda arguments: self._process().call(target, arguments, options or {}, seconds), calls))

    def check(self, target: str, positional: int, options: Mapping[str, Any]) -> None:
        """Load the target in one worker.

        Raises:
            Refused: it cannot be loaded, or does not take so many arguments and these options.
        """
        self._threads.submit(lambda: self._process().load(target, positional, options)).result()

    def _process(self) -> Process:
        """That of this thread."""
        if self._closed.is_set():
            raise RuntimeError("the pool of rewards is closed")
        process = getattr(self._own, "process", None)
        if process is None or not process.alive:
            if process is not None:
                self._processes.remove(process)
            process = self._own.process = Process(self._memory_bytes)
            self._processes.append(process)
        return process

    def close(self) -> None:
        """End the workers, those that are busy after their call."""
        self._end()


def _end(owner: int, closed: threading.Event, processes: list[Process], threads: ThreadPoolExecutor) -> None:
    if os.getpid() != owner:  # a fork of it, such as a data loader's, which has these workers only by name
        return
    closed.set()
    for process in list(processes):  # before their threads, whose end would kill them
        process.close()
    threads.shutdown(wait=True, cancel_futures=True)
