"""`megapsft` as a user starts it: a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def megapsft(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs to its end; standard output and error are text. Lines are wide enough that tables do not wrap."""
    ranks = ("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(ranks)}
    return subprocess.run(
        [sys.executable, "-m", "megapsft.cli", *arguments],
        cwd=cwd,
        env=inherited | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
