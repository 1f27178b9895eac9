"""Runs of a tiny model as jobs."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.command import megapsft
from tests.e2e.test_kill import records
from tests.shipped import FOLDER
from tests.slurm.jobs import Jobs

CLUSTER = ("--cluster", str(FOLDER / "cluster/laptop.yaml"), f"cluster.python={sys.executable}")
CLUSTER += ("cluster.preflight=false",)  # tests/slurm/test_preflight.py has it, and what launchers/slurm/train.sbatch starts
PSFT = FOLDER / "psft/tiny-qwen3-gsm8k.yaml"


def options(model: Path, data: Path, run: Path, *more: str) -> list[str]:
    """Of a run of 5 steps of 4 updates."""
    return [
        f"model.path={model}", f"data.path={data}", f"run.dir={run}", "train.steps=4", "train.sft_warmup_steps=1",
        "train.sft_warmup_lr=1e-3", "train.batch_size=16", "train.minibatch_size=4", "checkpoint.interval=2",
        "log.progress=false", "log.tensorboard=false", *more,
    ]  # fmt: skip


def submit(jobs: Jobs, *arguments: str) -> int:
    """`megapsft submit` on the cluster of the tests; the job's number."""
    done = megapsft("submit", *CLUSTER, *arguments, **jobs.cluster.environment)
    assert done.returncode == 0, done.stderr
    return jobs.adopt(int(re.match(r"job (\d+)", done.stdout)[1]))


def measured(run: Path) -> tuple[list[dict], list[dict]]:
    """All that the run wrote down of its updates and steps, but for times."""
    return records(run / "metrics.jsonl"), records(run / "steps.jsonl")


def on(*nodes: str) -> Sequence[str]:
    """The option of `megapsft submit` that names them."""
    return (f"--option=--nodelist={','.join(nodes)}",)
