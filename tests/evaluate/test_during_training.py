"""Benchmarks of a run, at the door, and beside training on demonstrations. Beside RL: tests/e2e/test_rl.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megapsft import cli
from megapsft.config import load_config
from megapsft.errors import Refused
from megapsft.evaluate.during_training import DuringTraining
from megapsft.train.plan import plan_run
from tests.ranks import run_ranks

CONFIG = Path(__file__).parents[2] / "configs/psft/tiny-qwen3-gsm8k.yaml"


@pytest.fixture
def overrides(tiny_models, tiny_data, tmp_path):
    def overrides(*more: str) -> list[str]:
        where = [f"model.path={tiny_models('qwen3')}", f"data.path={tiny_data}", f"run.dir={tmp_path / 'run'}"]
        return [*where, f"evaluate.data=[{tiny_data}]", *more]

    return overrides


@pytest.mark.parametrize(
    ("more", "refusal"),
    [
        (["evaluate.max_tokens=100000"], r"evaluate.max_tokens=100000: and prompts of \d+ tokens exceed max_position_embeddings"),
        (["evaluate.data=[nowhere.jsonl]"], "nowhere.jsonl"),
        (["evaluate.reward=nothing"], "'nothing': is not known"),
        (["evaluate.temperature=0", "rollout.weight_update=disk"], "is of SGLang servers, and rollout.engine=inprocess has none"),
    ],
)
def test_what_is_refused(overrides, more, refusal):
    with pytest.raises(Refused, match=refusal):
        DuringTraining(plan_run(load_config(CONFIG, overrides(*more)), 1))


def test_two_files_of_one_name_are_refused(overrides, tiny_data, tmp_path):
    shutil.copy(tiny_data, tmp_path / tiny_data.name)
    plan = plan_run(load_config(CONFIG, overrides(f"evaluate.data=[{tiny_data}, {tmp_path / tiny_data.name}]")), 1)
    with pytest.raises(Refused, match="train: is the name of two files"):
        DuringTraining(plan)


def test_a_run_on_demonstrations_is_evaluated_and_trains_the_same(overrides, tmp_path):
    few = ["train.batch_size=8", "train.minibatch_size=4", "train.sft_warmup_steps=1", "train.steps=3", "log.progress=false"]
    bench = ["evaluate.interval=2", "evaluate.limit=6", "evaluate.max_tokens=8", "log.tensorboard=false"]
    tp2 = "parallel.tensor_model_parallel_size=2"
    assert run_ranks(2, cli.main, ["train", str(CONFIG), *overrides(*few, *bench), tp2]) == [0, 0]
    found = [json.loads(line) for line in (tmp_path / "run/evaluations.jsonl").read_text().splitlines()]
    assert [record["step"] for record in found] == [0, 2, 4]
    assert all(0 <= record["evaluate/train/avg"] <= 1 for record in found)
    with_it = losses(tmp_path / "run")
    without = [*overrides(*few, "log.tensorboard=false"), "evaluate.data=[]", f"run.dir={tmp_path / 'without'}"]
    assert run_ranks(2, cli.main, ["train", str(CONFIG), *without, tp2]) == [0, 0]
    assert losses(tmp_path / "without") == with_it


def losses(run: Path) -> list[float]:
    return [json.loads(line)["train/loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
