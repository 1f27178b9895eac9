"""Every shipped config trains a tiny model for 50 updates: on generated problems, or on GSM8K's rows with `--gsm8k FILE`.

Not here: that a method is better than another, and learning rates for real models.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megapsft import cli
from megapsft.checkpoint.random_init import init_model
from megapsft.config import load_config
from megapsft.data.arithmetic import generate, preferences, read_problems, rollouts, write_jsonl
from megapsft.metrics.names import METRICS
from megapsft.objectives.registry import build_objective, objective_names
from tests.ranks import run_ranks
from tests.shipped import OBJECTIVES

CONFIGS = [path for path in OBJECTIVES if load_config(path).data.kind != "prompts"]  # those: test_rl.py
FIFTY = {  # updates: two a step, but for DPO, whose steps are one update
    "demonstrations": ["train.batch_size=16", "train.minibatch_size=8", "train.sft_warmup_steps=5", "train.steps=20"],
    "preferences": ["train.batch_size=8", "train.minibatch_size=8", "train.steps=50", "data.limit=32"],  # learned by heart
    "rollouts": ["train.batch_size=8", "train.minibatch_size=4", "train.steps=25"],
}


@pytest.fixture(scope="module")
def rows(request, tmp_path_factory) -> dict[str, Path]:
    """A file for each data.kind."""
    folder, gsm8k = tmp_path_factory.mktemp("rows"), request.config.getoption("--gsm8k")
    problems = read_problems(gsm8k, 400) if gsm8k else generate(400, 0)
    write_jsonl(folder / "demonstrations.jsonl", problems)
    write_jsonl(folder / "preferences.jsonl", preferences(problems, 0))
    write_jsonl(folder / "rollouts.jsonl", rollouts(problems, 0, each=4))
    return {kind: folder / f"{kind}.jsonl" for kind in FIFTY}


@pytest.fixture(scope="module")
def model(rows, tmp_path_factory):
    """family -> a random model with a tokenizer for these rows."""
    root = tmp_path_factory.mktemp("models")

    def make(family: str) -> Path:
        if not (root / family).exists():
            init_model(family=family, data_path=rows["demonstrations"], out_dir=root / family, seed=1)
        return root / family

    return make


def test_every_objective_has_a_config():
    assert {load_config(path).objective["name"] for path in CONFIGS} == set(objective_names())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_trains_for_fifty_updates(path, rows, model, tmp_path):
    config = load_config(path)
    kind, objective = config.data.kind, build_objective(config.objective)
    family = "qwen3_moe" if "moe" in path.stem else "qwen3"
    here = [f"model.path={model(family)}", f"data.path={rows[kind]}", f"run.dir={tmp_path / 'run'}", "log.progress=false"]
    arguments = ["train", str(path), *here, *FIFTY[kind], "checkpoint.interval=0", "log.tensorboard=false"]
    assert run_ranks(1, cli.main, arguments) == [0]

    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(records) == 50
    own = [record for record in records if record["phase"] == "train"]
    for record in records:
        assert all(math.isfinite(value) for value in record.values() if isinstance(value, float)), record
    assert own[-1]["train/skipped_updates"] == 0
    assert set(objective.metrics) <= set(own[0]) & set(METRICS)
    assert sum(record["train/grad_norm"] > 0 for record in own) > 0.9 * len(own)
    if objective.needs & {"old_logprobs"}:
        assert own[0]["objective/ratio_max"] == 1.0  # the first update of a step is the old policy
        assert max(record["objective/ratio_max"] for record in own) > 1.001
    if kind == "demonstrations":
        if config.objective["name"] == "dft":  # after so short a warm-up it gives up on what is improbable, and the nll rises
            assert own[-1]["objective/weight_mean"] > own[0]["objective/weight_mean"]
        else:
            assert own[-1]["objective/nll"] < records[0]["objective/nll"] - 0.5
    if kind == "preferences":
        assert own[-1]["rewards/margins"] > 0
        assert own[-1]["train/loss"] < own[0]["train/loss"]
        assert own[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)  # the policy is the reference
    if objective.critic:
        assert own[-1]["critic/loss"] < own[0]["critic/loss"]
