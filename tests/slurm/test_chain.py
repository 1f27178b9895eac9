"""A pipeline as jobs that wait for each other: it makes what `megapsft pipeline` makes; one that fails takes the rest with it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from megapsft.data.arithmetic import generate, write_jsonl
from tests.command import megapsft
from tests.shipped import FOLDER
from tests.slurm.jobs import Jobs
from tests.slurm.runs import CLUSTER, measured, on

pytestmark = pytest.mark.slurm


@pytest.fixture
def pipeline(tiny_models, tmp_path) -> Path:
    """PSFT, then GRPO, then the comparison, of few steps each."""
    sums = tmp_path / "sums.jsonl"
    write_jsonl(sums, generate(24, 3, "easy"))
    shared = {
        "data": {"path": str(sums)}, "checkpoint": {"interval": 0}, "log": {"progress": False, "tensorboard": False},
        "train": {"batch_size": 4, "minibatch_size": 2, "steps": 2, "sft_warmup_steps": 0},
    }  # fmt: skip
    config = {
        "model": str(tiny_models("qwen3")),
        "stages": [
            {"name": "psft", "config": str(FOLDER / "psft/tiny-qwen3-arithmetic.yaml"), "set": shared},
            {
                "name": "grpo",
                "config": str(FOLDER / "grpo/tiny-qwen3-arithmetic.yaml"),
                "set": shared | {"rollout": {"n": 2, "max_tokens": 8}, "optimizer": {"lr": 1.0e-3}},
            },
        ],
        "compare": {"data": [str(sums)], "limit": 4, "n": 2, "max_tokens": 8, "k": [1]},
    }
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def submit(jobs: Jobs, *arguments: str) -> dict[str, int]:
    """The jobs' numbers, by stage."""
    done = megapsft("submit", *CLUSTER, *arguments, **jobs.cluster.environment)
    assert done.returncode == 0, done.stderr
    return {name: jobs.adopt(int(number)) for number, name in re.findall(r"^job (\d+): (\w+)$", done.stdout, re.MULTILINE)}


def test_the_jobs_make_what_the_pipeline_makes(jobs, pipeline, tmp_path):
    chain, alone = tmp_path / "chain", tmp_path / "alone"
    numbers = submit(jobs, str(pipeline), *on("node1"), f"run.dir={chain}")
    assert list(numbers) == ["psft", "grpo", "compare"]
    assert f"afterok:{numbers['psft']}" in jobs.show(numbers["grpo"])["Dependency"]
    pipeline.rename(tmp_path / "submitted.yaml")  # what waits has a copy
    done = megapsft("pipeline", str(tmp_path / "submitted.yaml"), f"run.dir={alone}")
    assert done.returncode == 0, done.stderr
    for number in numbers.values():
        jobs.completes(number)
    for stage in ("psft", "grpo"):
        assert measured(chain / stage)[0] == measured(alone / stage)[0]
        name = "hf/model.safetensors"
        assert (chain / stage / name).read_bytes() == (alone / stage / name).read_bytes()
    rows, expected = (json.loads((folder / "hand-off.json").read_text()) for folder in (chain, alone))
    assert rows == expected
    assert [row["stage"] for row in rows] == ["start", "psft", "grpo"]

    told = json.loads(megapsft("status", str(chain), "--json", **jobs.cluster.environment).stdout)
    assert [(job["id"], job["state"]) for job in told["jobs"]] == [(str(job), "COMPLETED") for job in numbers.values()]


def test_a_stage_that_does_not_succeed_takes_those_after_it_with_it(jobs, pipeline, tmp_path):
    numbers = submit(jobs, str(pipeline), *on("node1"), f"run.dir={tmp_path / 'run'}")
    again = megapsft("submit", *CLUSTER, str(pipeline), f"run.dir={tmp_path / 'run'}", **jobs.cluster.environment)
    assert again.returncode == 2
    assert f"job {numbers['compare']}: is PENDING" in again.stderr
    megapsft("cancel", str(tmp_path / "run/psft"), **jobs.cluster.environment)
    for number in numbers.values():
        assert jobs.wait(number)["JobState"] == "CANCELLED"
    assert not (tmp_path / "run/grpo/config.yaml").exists()
