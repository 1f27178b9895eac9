"""A run that would clip noise is refused before its first update: measured by its own passes, on real ranks.

The noise here is real, of products of other shapes: an old pass that takes eight packs as one. The clip range is tiny instead.
Not here: FP8, which makes more of it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megapsft import cli
from megapsft.config import load_config
from megapsft.data.arithmetic import generate, write_jsonl
from megapsft.metrics.names import PARTS
from megapsft.objectives.registry import build_objective, objective_names
from megapsft.train.noise_limit import OF_FP8, limit_of
from tests.ranks import run_ranks

NOISY = ("train.no_grad_microbatches=8", "objective.clip_high=1e-9")
ZERO1 = ("parallel.use_distributed_optimizer=true", "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")


def train(folder: Path, model: Path, data: Path, *more: str, ranks: int = 1) -> list[int]:
    """Exit codes of `megapsft train` on the ranks."""
    (folder / "c.yaml").write_text("")
    options = [
        f"model.path={model}", f"data.path={data}", f"run.dir={folder / 'run'}", "model.dtype=float32", "train.batch_size=16",
        "train.minibatch_size=8", "train.steps=1", "data.pack_length=128", "optimizer.lr=1e-3", "checkpoint.async_save=false",
        "log.progress=false", "log.tensorboard=false", *more,
    ]  # fmt: skip
    return run_ranks(ranks, cli.main, ["train", str(folder / "c.yaml"), *options])


DEMONSTRATIONS = ("data.columns.prompt=question", "data.columns.demonstration=answer")


def found(folder: Path) -> dict:
    return json.loads((folder / "run/noise.json").read_text())


def records(folder: Path) -> list[dict]:
    file = folder / "run/metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize("more", [(), ZERO1], ids=["1 rank", "2 ranks with ZeRO-1"])
def test_refused_then_accepted_then_continued(more, scaled, tiny_data, tmp_path):
    model, ranks = scaled, 2 if more else 1
    noisy = (*DEMONSTRATIONS, *NOISY, *more)
    assert train(tmp_path, model, tiny_data, *noisy, "train.max_noise_clipped=0.01", ranks=ranks) == [2] * ranks
    refused = found(tmp_path)
    assert 0.01 < refused["clipped"] < refused["differ"] <= 1
    assert (refused["accepted"], refused["limit"], refused["unit"]) == (False, 0.01, "tokens")
    assert refused["clip_high"] == 1e-9 < refused["max"] < 1e-4
    assert records(tmp_path) == []
    assert not (tmp_path / "run/checkpoints/latest").exists()

    assert train(tmp_path, model, tiny_data, *noisy, "train.max_noise_clipped=1", ranks=ranks) == [0] * ranks
    assert found(tmp_path) == refused | {"limit": 1.0, "accepted": True}
    assert len(records(tmp_path)) == 2

    (tmp_path / "run/noise.json").unlink()
    more_steps = (*noisy, "train.max_noise_clipped=0.01", "train.steps=2")  # what was accepted is not asked again
    assert train(tmp_path, model, tiny_data, *more_steps, ranks=ranks) == [0] * ranks
    assert len(records(tmp_path)) == 4
    assert not (tmp_path / "run/noise.json").exists()


def test_measuring_changes_nothing(tiny_models, tiny_data, tmp_path):
    """The updates have the bits that they have without it; experts that are replayed included."""
    runs = []
    for name, more in (("with", ("train.max_noise_clipped=1",)), ("without", ())):
        folder = tmp_path / name
        folder.mkdir()
        more += (*DEMONSTRATIONS, "model.moe_routing_replay=true", "model.moe_aux_loss_coeff=0.01", "train.steps=2")
        assert train(folder, tiny_models("qwen3_moe"), tiny_data, *more) == [0]
        kept = [{key: value for key, value in record.items() if not key.startswith("perf/")} for record in records(folder)]
        runs.append(kept)
    assert runs[0] == runs[1]
    assert len(runs[0]) == 4
    assert found(tmp_path / "with")["differ"] == 0
    assert not (tmp_path / "without/run/noise.json").exists()


def test_with_sampled_responses(scaled, tmp_path):
    """Refused at the first step, once there are responses; where it is let through, sampling them is still part of that step."""
    write_jsonl(tmp_path / "prompts.jsonl", generate(16, 0, "easy"))
    sampling = (
        "objective.name=grpo", "data.kind=prompts", *DEMONSTRATIONS, "rewards=[{name: length, soft_limit: 4}]",
        "rollout.n=2", "rollout.max_tokens=8",
        "train.batch_size=4", "train.minibatch_size=2", *NOISY, "objective.clip_low=1e-9",
    )  # fmt: skip
    prompts = tmp_path / "prompts.jsonl"
    assert train(tmp_path, scaled, prompts, *sampling, "train.max_noise_clipped=0.01") == [2]
    assert found(tmp_path)["clipped"] > 0.01
    assert records(tmp_path) == []
    assert not (tmp_path / "run/checkpoints/latest").exists()

    assert train(tmp_path, scaled, prompts, *sampling, "train.max_noise_clipped=1") == [0]
    (step,) = [json.loads(line) for line in (tmp_path / "run/steps.jsonl").read_text().splitlines()]
    assert sum(step.get(f"perf/{part}_seconds", 0.0) for part in PARTS) <= step["perf/seconds"]


def limit(*options: str) -> float | None:
    config = load_config(None, ["train.batch_size=8", "train.minibatch_size=4", *options])
    return limit_of(config, build_objective(config.objective))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), None),
        (("fp8.format=hybrid",), OF_FP8),
        (("fp8.format=e4m3", "train.max_noise_clipped=0.05"), 0.05),
        (("train.max_noise_clipped=0.05",), 0.05),
        (("fp8.format=hybrid", "objective.name=sft"), None),
        (("fp8.format=hybrid", "objective.clip_high=null"), None),
        (("fp8.format=hybrid", "objective.name=luffy"), None),  # which clips where it is told to
        (("fp8.format=hybrid", "objective.name=luffy", "objective.on_policy_clip=0.2"), OF_FP8),
        (("fp8.format=hybrid", "train.minibatch_size=8"), None),  # no old pass
        (("fp8.format=hybrid", "train.minibatch_size=8", "objective.name=grpo", "objective.tis=token",
          "objective.tis_batch_normalize=true"), OF_FP8),  # which has one
    ],
)  # fmt: skip
def test_where_there_is_a_limit(options, expected):
    assert limit(*options) == expected


def test_every_objective_that_clips_ratios_says_where():
    known = {"cispo": (None, 4.0), "gspo": (3e-4, 4e-4), "psft": (None, 0.28), "hpt": (0.2, 0.2), "dapo": (0.2, 0.28)}
    known |= dict.fromkeys(("grpo", "ppo", "dr_grpo"), (0.2, 0.2))
    required = {"dr_grpo": {"max_response_length": 8}}
    said = {name: build_objective({"name": name, **required.get(name, {})}).clip_range for name in objective_names()}
    assert {name: clip_range for name, clip_range in said.items() if clip_range != (None, None)} == known
