"""An RL job of two trainers and an SGLang server, which is a step of its own on a node of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megapsft.data.arithmetic import generate, write_jsonl
from tests.shipped import FOLDER
from tests.slurm.runs import options, submit

pytestmark = pytest.mark.slurm


def test_trainers_and_a_server_on_nodes_of_their_own(jobs, tiny_models, tmp_path):
    write_jsonl(tmp_path / "problems.jsonl", generate(16, 3, "easy"))
    run = tmp_path / "run"
    given = options(
        tiny_models("qwen3"), tmp_path / "problems.jsonl", run, "parallel.tensor_model_parallel_size=2", "train.steps=3",
        "train.sft_warmup_steps=0", "train.batch_size=4", "train.minibatch_size=2", "rollout.engine=sglang", "rollout.n=2",
        "rollout.max_tokens=12", "log.rollouts=1",
    )  # fmt: skip
    config = str(FOLDER / "grpo/tiny-qwen3-arithmetic.yaml")
    job = submit(jobs, config, "--nodes", "2", "--rollout-nodes", "1", "--option=--exclude=node4,node5,node6", *given)
    jobs.completes(job, seconds=400)
    assert "restart 0 on node[1-2]" in (run / f"slurm/{job}.log").read_text()
    assert "http://node3:" in (run / f"slurm/{job}.0/server-0.log").read_text()
    steps = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    prompts = [json.loads(line) for path in sorted((run / "rollouts").glob("step-*.jsonl")) for line in path.open()]
    assert [len(prompt["rollouts"]) for prompt in prompts] == [2] * 4 * 3
    jobs.wait_for(lambda: not any(map(is_server, jobs.cluster.processes("node3"))), job)  # it ended with the job


def is_server(process: int) -> bool:
    try:
        return b"serve.py" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:  # it has ended
        return False
