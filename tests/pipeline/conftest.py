"""A model that half knows a few sums by heart, and pipelines of two small stages from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megapsft import cli
from megapsft.checkpoint.export import export_run
from megapsft.checkpoint.random_init import init_model
from megapsft.data.arithmetic import generate, preferences, write_jsonl
from tests.ranks import run_ranks

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = {"num_layers": 2, "hidden_size": 64, "head_dim": 16, "intermediate_size": 128, "vocab_size": 300}
QUIET = {"progress": False, "tensorboard": False}


@pytest.fixture(scope="session")
def sums(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    write_jsonl(path, generate(24, 3, "easy"))
    return path


@pytest.fixture(scope="session")
def pairs(sums, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_jsonl(path, preferences(generate(24, 3, "easy"), 0))
    return path


@pytest.fixture(scope="session")
def model(sums, tmp_path_factory) -> Path:
    """Answers some of the sums right, some of the time."""
    root = tmp_path_factory.mktemp("half-knowing")
    random = init_model(family="qwen3", data_path=sums, out_dir=root / "random", seed=1, **SMALL)
    where = [f"model.path={random}", f"data.path={sums}", f"run.dir={root / 'run'}"]
    steps = ["train.batch_size=24", "train.minibatch_size=24", "train.steps=65", "optimizer.lr=4e-3", "checkpoint.interval=0"]
    options = [*steps, "log.progress=false", "log.tensorboard=false"]
    assert run_ranks(1, cli.main, ["train", str(CONFIGS / "sft/tiny-qwen3-gsm8k.yaml"), *where, *options]) == [0]
    export_run(root / "run", root / "model")
    return root / "model"


@pytest.fixture(scope="session")
def stages(sums, pairs) -> dict[str, dict[str, Any]]:
    """By their names: stages of so few steps that they are soon done."""
    few = {"batch_size": 8, "minibatch_size": 4, "steps": 2, "sft_warmup_steps": 0}
    of_sums = {"data": {"path": str(sums)}, "log": QUIET, "checkpoint": {"interval": 1, "keep_last": 9}}
    rollout = {"n": 4, "max_tokens": 16}
    return {
        "psft": {
            "name": "psft",
            "config": str(CONFIGS / "psft/tiny-qwen3-arithmetic.yaml"),
            "set": of_sums | {"train": few, "optimizer": {"lr": 3.0e-4}},
        },
        "grpo": {
            "name": "grpo",
            "config": str(CONFIGS / "grpo/tiny-qwen3-arithmetic.yaml"),
            "set": of_sums | {"train": few | {"steps": 4}, "rollout": rollout, "optimizer": {"lr": 3.0e-4}},
        },
        "sft": {
            "name": "sft",
            "config": str(CONFIGS / "sft/tiny-qwen3-gsm8k.yaml"),
            "set": of_sums | {"train": few | {"steps": 1}},
        },
        "dpo": {
            "name": "dpo",
            "config": str(CONFIGS / "dpo/tiny-qwen3-preferences.yaml"),
            "set": of_sums | {"data": {"path": str(pairs)}, "train": few | {"steps": 1}, "reference": {"path": {"stage": "sft"}}},
        },
    }


@pytest.fixture(scope="session")
def pipeline(model, sums, stages) -> Callable[..., Path]:
    """(folder, names of stages, other keys) -> the config's file in the folder; run.dir is `run` beside it."""

    def write(folder: Path, *names: str, **other: Any) -> Path:
        tree = {
            "run": {"dir": str(folder / "run")},
            "model": str(model),
            "stages": [stages[name] for name in names],
            "compare": {"data": [str(sums)], "n": 4, "max_tokens": 16, "limit": 12, "k": [1, 4]},
        }
        path = folder / "pipeline.yaml"
        path.write_text(yaml.safe_dump(tree | other))
        return path

    return write
