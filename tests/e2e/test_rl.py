"""RL with the policy as its own engine: it learns, whatever the split; resumed it is what it would have been.

A model that half knows a few sums by heart is the start. Not here: SGLang (test_rl_sglang.py), and that a method is better than
another.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megapsft import cli
from megapsft.checkpoint.export import export_run
from megapsft.checkpoint.random_init import init_model
from megapsft.config import load_config
from megapsft.data.arithmetic import generate, write_jsonl
from tests.ranks import run_ranks
from tests.shipped import FOLDER, OBJECTIVES

PROMPTS = [path for path in OBJECTIVES if load_config(path).data.kind == "prompts"]
RESUMED = ["grpo/tiny-qwen3-arithmetic.yaml", "dapo/tiny-qwen3-arithmetic.yaml", "hpt/tiny-qwen3-arithmetic-relift.yaml"]
QUIET = ["log.progress=false", "log.tensorboard=false"]
FEW = ["train.batch_size=8", "train.minibatch_size=4", "rollout.n=4"]
FEW += ["optimizer.lr=3e-4", "optimizer.lr_warmup_steps=0", "optimizer.lr_decay_style=constant"]


@pytest.fixture(scope="session")
def sums(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    write_jsonl(path, generate(32, 3, "easy"))
    return path


@pytest.fixture(scope="session")
def half_knowing(sums, tmp_path_factory):
    """family -> a model that answers some of the sums right, some of the time."""
    root = tmp_path_factory.mktemp("half-knowing")

    def make(family: str = "qwen3") -> Path:
        out = root / family
        if not out.exists():
            small = {"num_layers": 2, "hidden_size": 64, "head_dim": 16, "intermediate_size": 128, "vocab_size": 300}
            model = init_model(family=family, data_path=sums, out_dir=root / f"{family}-random", seed=1, **small)
            where = [f"model.path={model}", f"data.path={sums}", f"run.dir={root / family}-run"]
            steps = ["train.batch_size=16", "train.minibatch_size=16", "train.steps=65", "train.sft_warmup_steps=0"]
            options = ["optimizer.lr=4e-3", "checkpoint.interval=0", *QUIET]
            arguments = ["train", str(FOLDER / "sft/tiny-qwen3-gsm8k.yaml"), *where, *steps, *options]
            assert run_ranks(1, cli.main, arguments) == [0]
            export_run(root / f"{family}-run", out)
        return out

    return make


@pytest.fixture
def train(sums, tmp_path):
    """Train a shipped config on the sums; the records of its steps."""

    def train(name: str, model: Path, run: str, *overrides: str, ranks: int = 1, config: Path | None = None) -> list[dict]:
        folder, config = tmp_path / run, config or FOLDER / name / "tiny-qwen3-arithmetic.yaml"
        where = [f"model.path={model}", f"data.path={sums}", f"run.dir={folder}"]
        arguments = ["train", str(config), *where, *FEW, *QUIET, *overrides]
        assert run_ranks(ranks, cli.main, arguments) == [0] * ranks
        return records(folder / "steps.jsonl")

    return train


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(steps: list[dict]) -> list[dict]:
    timed = ("perf/", "rollout/tokens_per_second")
    return [{key: value for key, value in step.items() if not key.startswith(timed)} for step in steps]


def test_grpo_learns_from_its_own_answers(train, half_knowing, sums, tmp_path):
    benchmark = [f"evaluate.data=[{sums}]", "evaluate.interval=12", "evaluate.n=4"]
    larger = ["train.batch_size=16", "train.minibatch_size=16", "rollout.n=8", "optimizer.lr=1e-3"]
    steps = train("grpo", half_knowing(), "run", "train.steps=24", *larger, *benchmark)
    assert len(steps) == 24
    first, last = (sum(step["reward/mean"] for step in some) / 4 for some in (steps[:4], steps[-4:]))
    assert 0.1 < first < 0.8
    assert last > first + 0.08
    for number, step in enumerate(steps, start=1):
        assert step["rollout/groups"] == 16
        assert step["epoch"] == number * 16 / 32
        assert step["reward/math_answer"] == pytest.approx(step["reward/mean"])  # one reward, of weight 1
        assert step["rollout/weight_lag_max"] == 0
        assert step["rollout/mismatch_max"] < 1e-4  # the engine is the policy
    found = records(tmp_path / "run/evaluations.jsonl")
    assert [(record["step"], record["update"]) for record in found] == [(0, 0), (12, 12), (24, 24)]
    assert found[-1]["evaluate/sums/avg"] > found[0]["evaluate/sums/avg"]


@pytest.mark.parametrize(
    ("family", "ranks", "split"),
    [
        ("qwen3", 2, "parallel.tensor_model_parallel_size=2"),
        ("qwen3", 2, "parallel.pipeline_model_parallel_size=2"),
        ("qwen3", 2, "parallel.use_distributed_optimizer=true"),
        ("qwen3_moe", 2, "parallel.expert_model_parallel_size=2"),
    ],
)
def test_a_split_samples_and_learns_the_same(family, ranks, split, train, half_knowing):
    alone = train("grpo", half_knowing(family), "alone", "train.steps=2")
    apart = train("grpo", half_knowing(family), "apart", "train.steps=2", split, ranks=ranks)
    for one, other in zip(without_times(alone), without_times(apart), strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if isinstance(value, float) and "mismatch" not in key:
                assert other[key] == pytest.approx(value, rel=2e-3, abs=2e-4), key


@pytest.mark.parametrize("path", [FOLDER / name for name in RESUMED], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_resumed_run_is_the_undisturbed_one(path, train, half_knowing):
    options = ["checkpoint.interval=2", *(["rollout.demonstration_buffer=4"] if "relift" in path.stem else [])]
    undisturbed = train("", half_knowing(), "undisturbed", "train.steps=4", *options, config=path)
    train("", half_knowing(), "resumed", "train.steps=2", *options, config=path)
    resumed = train("", half_knowing(), "resumed", "train.steps=4", *options, config=path)
    assert without_times(resumed) == without_times(undisturbed)
    assert ("relift" in path.stem) == (undisturbed[1]["rollout/held_demonstrations"] > 0)  # something waits in the checkpoint


@pytest.mark.parametrize("path", PROMPTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_shipped_config_trains_on_what_it_sampled(path, train, half_knowing, tmp_path):
    config = load_config(path)
    warmup = config.critic.warmup_steps
    options = ["optimizer.lr=1e-3", *(["rollout.demonstration_buffer=2"] if config.rollout.demonstration_buffer else [])]
    steps = train(path.parent.name, half_knowing(), "run", f"train.steps={warmup + 3}", *options, config=path)
    assert len(steps) == warmup + 3
    updates = [one for one in records(tmp_path / "run/metrics.jsonl") if one["phase"] == "train"]
    assert len(updates) >= 3
    for record in (*steps, *updates):
        assert all(math.isfinite(value) for value in record.values() if isinstance(value, float)), record
    assert any(record["train/grad_norm"] > 0 for record in updates)
    assert updates[-1]["train/skipped_updates"] == 0
    samples = sum(step["data/samples"] for step in steps)
    if config.data.select == "rft":
        right = sum(32 * step["reward/math_answer"] for step in steps)
        assert samples == pytest.approx(right)
        assert 0 < samples < 32 * len(steps)
    elif config.objective["name"] in ("srft", "luffy") or config.objective.get("gate", 0) is None:
        assert samples == (32 + 8) * len(steps)  # a demonstration stands in each group
    elif config.rollout.demonstration_buffer:
        held = int(steps[-1]["rollout/held_demonstrations"])
        unsolved, rest = divmod(32 * len(steps) - samples - held, 3)  # each has a demonstration, trained or held, for 4 rollouts
        assert rest == 0
        assert 0 <= held < 2 < unsolved < 8 * len(steps)
    elif config.objective["name"] == "hpt":
        assert 8 * len(steps) <= samples < (32 + 8) * len(steps)  # its rollouts, or its demonstration


def test_dynamic_sampling_trains_groups_that_differ(train, half_knowing):
    steps = train("dapo", half_knowing(), "run", "train.steps=3", "rewards=[{name: math_answer}]")
    assert all(step["rollout/equal_groups"] == 0 for step in steps)
    assert sum(step["rollout/discarded_groups"] for step in steps) > 0
    drawn = 32 * steps[-1]["epoch"]  # every prompt that was drawn is trained, or discarded
    assert drawn == sum(step["rollout/groups"] + step["rollout/discarded_groups"] for step in steps)


def test_adapters_answer_and_learn_and_the_reference_has_nothing_of_it(train, half_knowing, tmp_path):
    adapters = ["lora.rank=4", "objective.kl_coef=0.05", "optimizer.lr=1e-3", "train.steps=2"]
    steps = train("grpo", half_knowing(), "run", *adapters)
    assert len(steps) == 2
    first, *_, last = records(tmp_path / "run/metrics.jsonl")
    assert first["objective/kl"] < 1e-6 < 1e-4 < last["objective/kl"]
    for step in steps:
        assert step["rollout/mismatch_max"] < 1e-4  # what was sampled from has the adapters, too
        assert step["train/grad_norm"] > 0
