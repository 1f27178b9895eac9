"""What a part has found so far: line by line, so that one that fails, or for which there is no time, takes no other with it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megapsft.output.whole import write_whole

MEASURED, FAILED, NEEDS, NOT_REACHED = "measured", "failed", "needs", "not reached"
OF_A_MACHINE = re.compile(r"(?:/[\w.+@-]+)+/([\w.+@-]+)")  # paths say nothing elsewhere


class Unmet(Exception):
    """Something is not measured because of what this machine lacks; the message says what it needs."""


class Lines:
    """The lines of one part, kept in a file as they come."""

    def __init__(self, file: Path, part: str, deadline: float, free: Callable[[], None]):
        self.file, self.part, self.deadline, self.free = file, part, deadline, free
        self.facts: dict[str, Any] = {}  # of the part as a whole
        self.lines: dict[str, dict[str, Any]] = {}

    def add(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a line, unless the time is over."""
        if time.monotonic() > self.deadline:
            self.lines[name] = {"status": NOT_REACHED}
        else:
            self.lines[name] = attempt(measure)
        self.keep()
        self.free()

    def keep(self) -> None:
        """Write what there is; whole, or not at all."""
        found = json.loads(self.file.read_text()) if self.file.exists() else {}
        found[self.part] = {"facts": self.facts, "lines": self.lines}
        write_whole(self.file, json.dumps(found))


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it found, or why it did not."""
    try:
        return {"status": MEASURED, **measure()}
    except Unmet as error:
        return {"status": NEEDS, "error": str(error)}
    except Exception as error:  # whatever it is, other lines go on
        return {"status": FAILED, "error": in_short(f"{type(error).__name__}: {error}")}


def in_short(text: str) -> str:
    """One line of an error, without the folders of this machine."""
    return without_folders(" ".join(text.split()))[:400]


def without_folders(text: str) -> str:
    return OF_A_MACHINE.sub(r"\1", text)


def status_of(lines: dict[str, dict[str, Any]]) -> str:
    """Of a part: measured, failed, needs or not reached where all its lines are, else partly."""
    found = {line["status"] for line in lines.values()}
    if MEASURED in found:  # what no machine of this kind has does not make it part of a whole
        return MEASURED if found <= {MEASURED, NEEDS} else "partly"
    return next((status for status in (FAILED, NOT_REACHED, NEEDS) if status in found), FAILED)
