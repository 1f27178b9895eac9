"""Stopping on request: a run that is asked to ends after the step that it is in, saved, and says so in a file.

    RUN/stop           whoever wants the run to stop makes it; removed when that has been done, or the run is over
    RUN/stopped.json   {"step": 12, "reason": "file"}: stopped on purpose and not finished; removed by the run that goes on
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megapsft.output.whole import write_whole

REQUEST, MARKER = "stop", "stopped.json"
STOPPED = os.EX_TEMPFAIL  # 75: exit code of `megapsft train` where the run was stopped, and not finished
REASONS = ("", "time", "file", "signal")  # where there are several, the last of them is written down


class Stop:
    """What asks a run to stop: `RUN/stop`, `run.stop_after`, a signal to any of its ranks.

    Args:
        folder: of the run.
        minutes: since now, after which it asks by itself; None: never.
        signalled: whether this rank was sent the signal.
    """

    def __init__(self, folder: Path, minutes: float | None, signalled: Callable[[], bool]):
        self.folder, self.signalled = folder, signalled
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes

    def asked(self, device: torch.device) -> str | None:
        """Collective. Why the run is to stop, the same on all ranks; None: it is not."""
        reason = ""
        if dist.get_rank() == 0:  # one looks at files and clocks: others might see them a step later
            if self.deadline is not None and time.monotonic() >= self.deadline:
                reason = "time"
            if (self.folder / REQUEST).exists():
                reason = "file"
        if self.signalled():
            reason = "signal"
        found = torch.tensor(REASONS.index(reason), device=device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return REASONS[int(found.item())] or None

    def settle(self, step: int, reason: str | None) -> None:
        """On one rank, when all is saved: leave the marker where the run was stopped, and nothing that asks."""
        if reason is not None:
            write_whole(self.folder / MARKER, json.dumps({"step": step, "reason": reason}) + "\n")
        withdraw(self.folder)


def ask(folder: Path) -> None:
    """Ask the run in `folder` to stop."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REQUEST).touch()


def withdraw(folder: Path) -> None:
    """Ask it no longer."""
    (folder / REQUEST).unlink(missing_ok=True)


def was_stopped(folder: Path) -> bool:
    """Whether the run in `folder` was stopped on purpose, and has not gone on since."""
    return (folder / MARKER).exists()


def go_on(folder: Path) -> None:
    """The run in `folder` goes on, or begins: it is not stopped any more."""
    (folder / MARKER).unlink(missing_ok=True)
