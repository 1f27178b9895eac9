"""Responses as they come, one line each, so that a command that was killed goes on from there."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megapsft.errors import Refused
from megapsft.output.whole import write_whole


class Journal:
    """A JSONL that is appended to, and beside it, with the suffix .json, the options that decide what is in it.

    A line holds some rollouts to the prompt of one row of the data: `row` counts from 0, and `number` is that of the first of the
    rollouts, among all to its prompt. A line counts once its end is written: half a line at the end is cut. One process at a time
    holds the file.

    Args:
        path: ends in .jsonl.
        options: JSON; what was begun with others is refused.

    Raises:
        Refused: another suffix; other options, no such options beside the file, or lines that this has not written; the file is
            held by another process.
    """

    def __init__(self, path: str | Path, options: Mapping[str, Any]):
        self.path = Path(path)
        if self.path.suffix != ".jsonl":
            raise Refused(str(path), "must end in .jsonl", f"use {self.path.with_suffix('.jsonl')}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # lockf would let go once any handle of the file is closed
        except OSError:
            self._file.close()
            raise Refused(str(path), "is being written by another process", "wait for it, or name another file") from None
        try:
            self._agree(json.loads(json.dumps(options)))
            self._cut()
            self.done = {(record["row"], record["number"]) for record in self.read()}
        except BaseException:
            self._file.close()
            raise

    @property
    def options_path(self) -> Path:
        return self.path.with_suffix(".json")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record, at once: a kill of this process loses nothing that was written."""
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()
        self.done.add((record["row"], record["number"]))

    def sync(self) -> None:
        """What was written outlives the machine's end too."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _agree(self, options: dict[str, Any]) -> None:
        if self.options_path.is_file():
            before = _options(self.options_path)
            for key in dict.fromkeys([*options, *before]):
                if before.get(key) != options.get(key):
                    rule = f"differs from the {before.get(key)!r} that {self.path} was begun with"
                    raise Refused(f"{key}={options.get(key)!r}", rule, "name another file, or give the old value to go on")
            return
        if os.fstat(self._file.fileno()).st_size:
            rule = f"is there, without {self.options_path.name} that says how it was made"
            raise Refused(str(self.path), rule, "name another file, or remove it")
        write_whole(self.options_path, json.dumps(options, indent=2))

    def read(self) -> Iterator[dict[str, Any]]:
        """All records in the order of the file."""
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    record = json.loads(line)
                except ValueError:
                    record = None
                if not isinstance(record, dict) or not {"row", "number", "rollouts"} <= record.keys():
                    rule = "is not a line that this command writes"
                    raise Refused(f"{self.path}:{number}", rule, "name another file, or remove it")
                yield record

    def _cut(self) -> None:
        """Cut half a line at the end."""
        written = self.path.read_bytes()
        if not written.endswith(b"\n"):
            os.truncate(self.path, written.rfind(b"\n") + 1)


def _options(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise Refused(str(path), "holds no options of this command", "name another file, or remove it")
    return found
