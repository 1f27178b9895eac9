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
LINE = re.compile(r"^(?:\d+: )?(\{\"node\": .*\})$")  # with srun's label, or without


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
    """Those among lines that may hold anything else too."""
    found = (LINE.match(line.rstrip("\n")) for line in lines)
    return [Finding(**json.loads(line[1])) for line in found if line]


def good(check: str, value: str) -> Finding:
    """Of this node."""
    return Finding(node=here(), check=check, good=True, value=value)


def bad(check: str, value: str, rule: str, remedy: str) -> Finding:
    """Of this node."""
    return Finding(node=here(), check=check, good=False, value=value, rule=rule, remedy=remedy)


def here() -> str:
    """The name of this node, as Slurm knows it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
