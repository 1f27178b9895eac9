"""Processes that multiprocessing spawns end with the process that spawned them."""

from __future__ import annotations

import os
import select
import sys
import threading


def end_with_parent() -> None:
    """In a spawned process: end when its parent has ended, however that came about. Elsewhere: nothing (Linux).

    Megatron saves checkpoints in the background with the help of such a process, which would outlive a rank that was killed, with
    all the memory of an import of torch.
    """
    if "--multiprocessing-fork" not in sys.orig_argv or not hasattr(os, "pidfd_open"):
        return
    parent = os.pidfd_open(os.getppid())

    def watch() -> None:
        select.select([parent], [], [])
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
