"""What of a conversion is on the disk already, so that one that was killed goes on from there."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

NAME = "progress.jsonl"


class Done(NamedTuple):
    """A tensor that is written."""

    sha256: str  # of its bytes as written
    nonfinite: int
    sources: dict[str, str]  # what was read for it, and the sha256 of that


class Journal:
    """One line for the plan, one for each tensor that is safely on the disk.

    Args:
        folder: of the unfinished target.
        fingerprint: of all that decides what is written; another one than the folder's means to begin again.
        sync: makes what was written so far safe; called before lines are.
        every: seconds between two syncs.
    """

    def __init__(self, folder: Path, fingerprint: str, sync: Callable[[], None], every: float = 5.0):
        self._path, self._sync, self._every = folder / NAME, sync, every
        self.done: dict[str, Done] = {}
        self._waiting: dict[str, Done] = {}
        self._lock, self._last = threading.Lock(), time.monotonic()
        lines, size = _lines(self._path)
        if lines and lines[0] == {"plan": fingerprint}:
            self.done = {line["tensor"]: Done(line["sha256"], line["nonfinite"], line["sources"]) for line in lines[1:]}
            os.truncate(self._path, size)  # or the next line would be lost with the half one before it
            self._file = self._path.open("a")
        else:
            self._file = self._path.open("w")
            self._write([{"plan": fingerprint}])

    def add(self, tensor: str, done: Done) -> None:
        """The tensor is written; with the next sync, it is safe."""
        with self._lock:
            self.done[tensor] = self._waiting[tensor] = done
            if time.monotonic() - self._last < self._every:
                return
            self.flush()

    def flush(self) -> None:
        """Make all that was added safe."""
        waiting, self._waiting = self._waiting, {}
        self._sync()
        self._write([{"tensor": tensor, **done._asdict()} for tensor, done in waiting.items()])
        self._last = time.monotonic()

    def close(self) -> None:
        self._file.close()

    def _write(self, lines: list[dict[str, Any]]) -> None:
        self._file.write("".join(json.dumps(line) + "\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())


def matches(folder: Path, fingerprint: str) -> bool:
    """Whether what is in the folder was begun with the same plan."""
    return _lines(folder / NAME)[0][:1] == [{"plan": fingerprint}]


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole lines, and how many bytes they are; a kill can leave half of one at the end."""
    found, size = [], 0
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
        size += len(line) + 1
    return found, size
