"""`megapsft` as a user starts it: a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def megapsft(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs to its end; standard output and error are text. Lines are wide enough that tables do not wrap."""
    return subprocess.run(
        command(arguments), cwd=cwd, env=its(environment), capture_output=True, text=True, timeout=300
    )  # fmt: skip


@contextmanager
def megapsft_started(*arguments: str, log: Path, cwd: Path = ROOT, **environment: str) -> Iterator[subprocess.Popen]:
    """Runs while the body does, and is killed with it; `log` has what it says."""
    with log.open("wb") as said, subprocess.Popen(
        command(arguments), cwd=cwd, env=its(environment), stdout=said, stderr=subprocess.STDOUT
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def command(arguments: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-m", "megapsft.cli", *arguments]


def its(environment: dict[str, str]) -> dict[str, str]:
    """Ours, but for what would make it a rank of another world."""
    ranks = ("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(ranks)}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # where packages may be, too
    return inherited | {"PYTHONPATH": path, "COLUMNS": "200", "OMP_NUM_THREADS": "1"} | environment
