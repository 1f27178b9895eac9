"""Which rank of an attempt failed first, and what it said last."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

TAIL_BYTES = 65536


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A rank that ended by itself with another exit code than 0; those that were ended because of it are none."""

    seconds: float  # since the epoch
    rank: int
    host: str
    code: int

    @property
    def how(self) -> str:
        if self.code > 128:
            try:
                return f"was killed by {signal.Signals(self.code - 128).name}"
            except ValueError:
                pass
        return {70: "hung (exit code 70)"}.get(self.code, f"ended with exit code {self.code}")


def failures(attempt: Path) -> list[Failure]:
    """Of launchers/slurm/rank.sh, the first one first; those that said nothing after those that did."""
    file = attempt / "failures"
    found = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        seconds, rank, host, code = line.split()
        found.append(Failure(seconds=float(seconds), rank=int(rank), host=host, code=int(code)))
    return sorted(found, key=lambda failure: (_silent(attempt / f"rank-{failure.rank}.log"), failure.seconds))


def _silent(log: Path) -> bool:
    return not log.is_file() or not log.stat().st_size


def last_lines(log: Path, count: int) -> list[str]:
    """The end of a file; of one that is not there, nothing."""
    if not log.is_file():
        return []
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
        return file.read().decode(errors="replace").splitlines()[-count:]
