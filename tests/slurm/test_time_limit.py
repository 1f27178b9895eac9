"""A run that takes longer than its job: saved before the time is over, requeued, and done as if it never stopped."""

from __future__ import annotations

import pytest

from tests.slurm.runs import PSFT, measured, on, options, submit

pytestmark = pytest.mark.slurm

SLOW = """\
import os, time
from dataclasses import dataclass
from megapsft.objectives.psft import PSFT


@dataclass(frozen=True, kw_only=True)
class Slow(PSFT):
    def __call__(self, output, batch):
        time.sleep(float(os.environ["SLOW_SECONDS"]))
        return super().__call__(output, batch)
"""
STEPS, UPDATES, SECONDS = 45, 4, 1.0  # three minutes at least


def test_a_job_of_a_minute_for_a_run_of_three(jobs, tiny_models, tiny_data, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)

    def given(run: str, seconds: float) -> list[str]:
        of_run = options(
            tiny_models("qwen3"), tiny_data, tmp_path / run, "parallel.pipeline_model_parallel_size=2", f"train.steps={STEPS}",
            "train.sft_warmup_steps=0", f"objective.name={tmp_path / 'slow.py'}", "checkpoint.interval=1000",
        )  # fmt: skip
        return [*of_run, f"cluster.environment={{SLOW_SECONDS: '{seconds}'}}"]

    whole = submit(jobs, str(PSFT), "--nodes", "2", *on("node5", "node6"), *given("whole", 0.0))
    job = submit(
        jobs, str(PSFT), "--nodes", "2", *on("node3", "node4"), *given("run", SECONDS / 2), "cluster.time=00:01:00",
        "cluster.signal_seconds=15", "cluster.preflight=false",
    )  # fmt: skip
    jobs.completes(whole)
    shown = jobs.completes(job, seconds=1200)
    assert int(shown["Restarts"]) >= 2, jobs.why(job)
    assert "TIMEOUT" not in jobs.log(job).read_text()
    assert measured(tmp_path / "run") == measured(tmp_path / "whole")
    assert len(measured(tmp_path / "run")[0]) == STEPS * UPDATES
    assert not (tmp_path / "run/stopped.json").exists()
