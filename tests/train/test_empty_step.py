"""A step of which an objective keeps nothing: said, counted, survived."""

from __future__ import annotations

import json

from megapsft import cli
from megapsft.data.arithmetic import generate, rollouts, write_jsonl
from tests.ranks import run_ranks


def test_a_step_without_anything_to_train_is_passed_over(tiny_models, tmp_path):
    rows = list(rollouts(generate(4, 0), 0, each=2))
    for row in rows[:2]:  # two of four steps have a demonstration alone
        for rollout in row["rollouts"]:
            rollout["response"] = "so " * 600
    write_jsonl(tmp_path / "rollouts.jsonl", rows)
    (tmp_path / "c.yaml").write_text("")
    for name in ("grpo", "ppo"):
        options = [
            f"objective.name={name}", "data.kind=rollouts", f"model.path={tiny_models('qwen3')}", "train.batch_size=1",
            f"data.path={tmp_path / 'rollouts.jsonl'}", "data.shuffle=false", "data.max_length=256", "train.steps=4",
            f"run.dir={tmp_path / name}", "model.dtype=float32", "log.progress=false", "log.tensorboard=false",
        ]  # fmt: skip
        assert run_ranks(1, cli.main, ["train", str(tmp_path / "c.yaml"), *options]) == [0]
        records = [json.loads(line) for line in (tmp_path / name / "steps.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == [3, 4]
