"""A run that hangs: nothing has gone on for many times as long as a step takes. Its stacks are written, then it ends."""

from __future__ import annotations

import datetime
import faulthandler
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from pathlib import Path

HUNG = 70  # exit code of a rank that found itself hanging: EX_SOFTWARE
STEPS = 20  # the last ones, whose median counts
POLL_SECONDS = 1.0
REPORT_SECONDS = 60.0


class Heartbeat:
    """When something went on last, and how long steps take; what happens between steps and is no part of them is not watched.

    Whole steps are compared, not updates: the first update of a step comes after its rollouts and the passes of the old policy,
    and may take a hundred times as long as those that follow.

    Args:
        factor: a hang is no update for so many times the median of the last steps; None: there are no hangs.
        seconds: but never for less than this.
    """

    def __init__(self, factor: float | None = None, seconds: float = 0.0):
        self.factor, self.seconds = factor, seconds
        self._steps: deque[float] = deque(maxlen=STEPS)
        self._began = 0.0
        self.since: float | None = None  # when something went on last, of time.monotonic(); None: not watched

    def begin(self) -> None:
        """A step begins."""
        self._began = self.since = time.monotonic()

    def beat(self) -> None:
        """An update has ended."""
        self.since = time.monotonic()

    def end(self) -> None:
        """A step has ended, but for what comes between steps."""
        self.since = time.monotonic()
        self._steps.append(self.since - self._began)

    def rest(self) -> None:
        """What comes now takes as long as it takes: an evaluation, a checkpoint. Until the next step begins."""
        self.since = None

    def forget(self) -> None:
        """The steps that follow are of another kind."""
        self._steps.clear()

    @property
    def limit(self) -> float | None:
        """Seconds without an update that are a hang; None while no step of its kind has been seen."""
        steps = list(self._steps)  # at once: they may be forgotten while another thread looks
        if self.factor is None or not steps:
            return None
        return max(self.seconds, self.factor * statistics.median(steps))


class HangWatch:
    """A thread of this rank that looks at its heart. Every rank watches itself, and signals no other.

    Where it hangs, the stacks of all its threads go to `folder/rank-<rank>-<number>.txt`. The other ranks, which wait for one
    another, have as much time to write theirs; if by then nothing has gone on, the process ends with HUNG, at once: it could not
    leave its collectives in order, and a launcher ends the others when one has failed.

    Time in which the process itself did not run (SIGSTOP, a machine that stood still) is no hang of its own: where it was as long
    as one, the stacks are written, and it goes on.

    Args:
        grace: seconds between writing and ending; default: a quarter of the limit, at most a minute.
    """

    def __init__(self, heart: Heartbeat, folder: Path, rank: int, grace: float | None = None):
        self.heart, self.folder, self.rank, self.grace = heart, folder, rank, grace
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._closed.wait(POLL_SECONDS):
            now, before = time.monotonic(), looked
            looked, since, limit = now, self.heart.since, self.heart.limit
            if since is None or limit is None:
                continue
            stood_still = now - before - POLL_SECONDS
            if stood_still > POLL_SECONDS:
                if stood_still > limit:
                    self._report_aside(f"did not run for {stood_still:.0f} s, and goes on")
                if self.heart.since == since:
                    self.heart.since = now
            elif now - since > limit:
                self._hangs(since, f"no update for {now - since:.0f} s (a hang after {limit:.0f} s)", limit)
                looked = time.monotonic()

    def _hangs(self, since: float, found: str, limit: float) -> None:
        grace = min(limit / 4, 60.0) if self.grace is None else self.grace
        self._report_aside(f"{found}; it ends in {grace:.0f} s with exit code {HUNG}")
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline:
            if self._closed.wait(min(POLL_SECONDS, grace)) or self.heart.since != since:
                print(f"megapsft: rank {self.rank}: it goes on after all", file=sys.stderr, flush=True)
                return
        os._exit(HUNG)

    def _report_aside(self, found: str) -> None:
        """In a thread of its own, which is waited for, but not for ever: what hangs may be the file system."""
        thread = threading.Thread(target=self._report, args=(found,), name="hang-report", daemon=True)
        thread.start()
        thread.join(REPORT_SECONDS)

    def _report(self, found: str) -> None:
        """Write the stacks of all threads to a file that was not there, and say so."""
        self.folder.mkdir(parents=True, exist_ok=True)
        number = 0
        while (path := self.folder / f"rank-{self.rank}-{number}.txt").exists():
            number += 1
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with path.open("w") as file:
            file.write(f"{now} rank {self.rank}, process {os.getpid()} on {socket.gethostname()}: {found}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        print(f"megapsft: rank {self.rank}: {found}; stacks: {path}", file=sys.stderr, flush=True)
