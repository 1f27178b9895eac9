"""What a check found on a node, and how it travels: a line of JSON on standard output, which reaches the batch shell over Slurm's
own network, also from a node that does not see the shared folder.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterable
from dataclasses import asdict, dataclass

LONGEST = 900  # bytes of a line; srun breaks lines of more than 1024
LABELLED = re.compile(r"(?:(\d+): )?(.*)")  # by srun, or not


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The outcome of one check on one node.

    Example:
        >>> Finding(node="node7", check="disk", good=False, value="0.2 GiB free in run", rule="needs 5 GiB", remedy="make room")
    """

    node: str
    check: str
    good: bool
    value: str
    rule: str = ""  # that it breaks; where it is good, nothing
    remedy: str = ""

    def line(self) -> str:
        """One line, with what is too long cut short."""
        told, most = asdict(self), 300
        while len(line := json.dumps(told)) > LONGEST:
            told |= {name: told[name][:most] for name in ("value", "rule", "remedy")}
            most //= 2
        return line


def read(lines: Iterable[str]) -> list[Finding]:
    """Those among lines that may hold anything else too.

    srun takes what a task has printed in pieces of 1024 bytes and ends a line where a piece ends: what is not whole is gone on
    with by the next line of the same task, which may come after some of others.
    """
    found, begun = [], {}
    for line in lines:
        label, text = LABELLED.fullmatch(line.rstrip("\n")).groups()
        text = text if text.startswith("{") else begun.pop(label, "") + text
        if not text.startswith("{"):
            continue
        try:
            told = json.loads(text)
        except ValueError:
            begun[label] = text
            continue
        if told.keys() == Finding.__dataclass_fields__.keys():
            found.append(Finding(**told))
    return found


def good(check: str, value: str) -> Finding:
    """Of this node."""
    return Finding(node=here(), check=check, good=True, value=value)


def bad(check: str, value: str, rule: str, remedy: str) -> Finding:
    """Of this node."""
    return Finding(node=here(), check=check, good=False, value=value, rule=rule, remedy=remedy)


def here() -> str:
    """The name of this node, as Slurm knows it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
