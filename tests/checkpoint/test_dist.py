"""A run goes on as if it had never stopped: on the same split bit for bit, on another to 1e-5. Real ranks, real files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import psutil
import pytest

from megapsft.config import load_config
from megapsft.parallel import initialize, shutdown
from megapsft.train.loop import train
from megapsft.train.plan import plan_run
from megapsft.train.start import start
from tests.invariants.splits import Split, split
from tests.ranks import run_ranks

STEPS, SAVED_AT = 4, 2

SAME = [
    ("qwen3", split("1 rank")),
    ("qwen3", split("tp2+sp", 2, tp=2, sp=True)),
    ("qwen3", split("dp2+zero1+overlap", 2, zero1=True, overlap=True, gather=True)),
    ("qwen3", split("pp2+vpp2", 2, pp=2, vpp=2)),
    ("qwen3_moe", split("ep2", 2, ep=2)),
    ("qwen3", split("adapters", rank=4)),
    ("qwen3_moe", split("adapters, ep2+zero1", 2, ep=2, zero1=True, rank=4)),
]
OTHER = [
    ("qwen3", split("tp2+sp", 2, tp=2, sp=True), split("pp2", 2, pp=2)),
    ("qwen3", split("dp2+zero1", 2, zero1=True), split("1 rank")),
    ("qwen3", split("1 rank"), split("dp2+zero1", 2, zero1=True)),
    ("qwen3", split("pp2+vpp2", 2, pp=2, vpp=2), split("cp2", 2, cp=2)),
    ("qwen3_moe", split("ep2+zero1", 2, ep=2, zero1=True), split("1 rank")),
    ("qwen3_moe", split("1 rank"), split("tp2+ep2+etp1", 2, tp=2, ep=2, etp=1)),
    ("qwen3_moe", split("tp2+sp", 2, tp=2, sp=True), split("pp2", 2, pp=2)),
    ("qwen3", split("adapters, tp2+sp", 2, tp=2, sp=True, rank=4), split("adapters, dp2+zero1", 2, zero1=True, rank=4)),
]


def name(value: object) -> str:
    return value.name if isinstance(value, Split) else str(value)


@pytest.mark.parametrize(("family", "on"), SAME, ids=name)
def test_a_resumed_run_equals_one_never_stopped(family, on, tiny_models, tiny_data, tmp_path):
    whole = train_to_end(tiny_models(family), tiny_data, tmp_path / "run", on)
    forget_after_the_save(tmp_path / "run")
    again = train_to_end(tiny_models(family), tiny_data, tmp_path / "run", on)
    assert again == whole


@pytest.mark.parametrize(("family", "before", "after"), OTHER, ids=name)
def test_a_run_resumed_on_another_split_agrees(family, before, after, tiny_models, tiny_data, tmp_path):
    whole = train_to_end(tiny_models(family), tiny_data, tmp_path / "run", before)
    forget_after_the_save(tmp_path / "run")
    again = train_to_end(tiny_models(family), tiny_data, tmp_path / "run", after)
    assert len(again) == len(whole)
    for ours, theirs in zip(again, whole, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == (pytest.approx(value, rel=1e-5, abs=1e-5) if isinstance(value, float) else value), key


def test_bf16_resumes_on_another_split_with_its_fp32_main_parameters(tiny_models, tiny_data, tmp_path):
    bf16 = ("model.dtype=bfloat16",)
    before, after = split("dp2+zero1", 2, zero1=True), split("dp2", 2)
    whole = train_to_end(tiny_models("qwen3"), tiny_data, tmp_path / "run", before, bf16)
    forget_after_the_save(tmp_path / "run")
    again = train_to_end(tiny_models("qwen3"), tiny_data, tmp_path / "run", after, bf16)
    # bf16 rounds a weight the other way now and then; without the main parameters the difference would be 1e-3
    assert [r["train/loss"] for r in again] == pytest.approx([r["train/loss"] for r in whole], rel=1e-4)


def test_only_the_last_checkpoints_and_the_best_are_kept(tiny_models, tiny_data, tmp_path):
    options = ("checkpoint.interval=1", "checkpoint.keep_last=1", "checkpoint.keep_best=true", "optimizer.lr=0.3")
    train_to_end(tiny_models("qwen3"), tiny_data, tmp_path / "run", split("1 rank"), options)
    folder = tmp_path / "run" / "checkpoints"
    best, latest = (folder / "best").resolve(), (folder / "latest").resolve()
    assert latest.name == f"step-{STEPS + 1:08d}"
    assert {p.name for p in folder.glob("step-*")} == {best.name, latest.name}
    losses = {r["step"]: r["train/loss"] for r in records(tmp_path / "run" / "steps.jsonl")}
    assert json.loads((best / "state.json").read_text())["score"] == min(losses.values())


def test_a_checkpoint_that_was_being_written_is_never_read(tiny_models, tiny_data, tmp_path):
    whole = train_to_end(tiny_models("qwen3"), tiny_data, tmp_path / "run", split("1 rank"))
    forget_after_the_save(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / f"step-{STEPS + 1:08d}.partial").mkdir()
    assert train_to_end(tiny_models("qwen3"), tiny_data, tmp_path / "run", split("1 rank")) == whole


def train_to_end(model: Path, data: Path, run: Path, on: Split, more: tuple[str, ...] = ()) -> list[dict]:
    """Records of all updates; the run continues where `run` stands."""
    options = [
        f"model.path={model}", f"data.path={data}", "data.columns.prompt=question", "data.columns.demonstration=answer",
        f"run.dir={run}", "model.dtype=float32", "objective.name=psft", f"train.steps={STEPS}", "train.sft_warmup_steps=1",
        "train.sft_warmup_lr=1e-3", "train.batch_size=8", "train.minibatch_size=4", "optimizer.lr=1e-3",
        "optimizer.lr_decay_style=cosine", f"checkpoint.interval={SAVED_AT}", "checkpoint.keep_last=9", "log.progress=false",
        "log.tensorboard=false", "data.pack_length=256", *on.options, *more,
    ]  # fmt: skip
    run_ranks(on.world, _train, options)
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in records(run / "metrics.jsonl")]


def _train(options: list[str]) -> None:
    config = load_config(None, options)
    plan = plan_run(config, int(os.environ["WORLD_SIZE"]))
    initialize(plan.mesh, config.parallel, config.train.seed)
    train(start(plan))
    assert not psutil.Process().children(recursive=True), "what writes a checkpoint ends with it"
    shutdown()


def forget_after_the_save(run: Path) -> None:
    """The folder as it was when a kill came after the checkpoint at step SAVED_AT; metrics of later updates stay."""
    folder = run / "checkpoints"
    for path in folder.glob("step-*"):
        if path.name > f"step-{SAVED_AT:08d}":
            shutil.rmtree(path)
    (folder / "latest").unlink()
    (folder / "latest").symlink_to(f"step-{SAVED_AT:08d}")


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
