"""SIGUSR1 to all processes of a run, as a batch system sends it before the time is over; then the same command again."""

from __future__ import annotations

import contextlib
import json
import os
import signal

import pytest

from megapsft import cli
from megapsft.metrics.records import read_records
from megapsft.train.stop import STOPPED
from tests.e2e.test_kill import UPDATES, count, descendants, records, start, wait_for, wait_until_gone
from tests.metrics.pages import events, rows, texts
from tests.ranks import run_ranks

SPLIT = ["parallel.tensor_model_parallel_size=2", "checkpoint.interval=2", "train.steps=6"]
TRACKED, UNTRACKED = ["log.wandb=offline", "log.tensorboard=true"], ["log.wandb=disabled", "log.tensorboard=false"]


def test_signalled_and_requeued(tiny_models, tiny_data, tmp_path):
    model, run = tiny_models("qwen3"), tmp_path / "run"
    first = start(model, tiny_data, run, [*SPLIT, *TRACKED])
    wait_for(lambda: count(run / "metrics.jsonl") >= 3 * UPDATES, first)
    processes = descendants(first.pid)
    assert len(processes) >= 5  # two ranks, each with a process that helps it to save, and that of wandb
    for process in (*processes, first.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGUSR1)
    assert first.wait(timeout=120) == STOPPED, first.stderr.read()
    wait_until_gone(processes)
    marker = json.loads((run / "stopped.json").read_text())
    assert marker["reason"] == "signal"
    assert os.readlink(run / "checkpoints/latest") == f"step-{marker['step']:08d}"
    assert count(run / "metrics.jsonl") == marker["step"] * UPDATES  # nothing is done twice
    assert not (run / "stop").exists()

    again = start(model, tiny_data, run, [*SPLIT, *TRACKED])
    assert again.wait(timeout=300) == 0, again.stderr.read()
    assert not (run / "stopped.json").exists()
    (run_id,) = {folder.name.rsplit("-", 1)[1] for folder in (run / "wandb").glob("offline-run-*")}
    assert (run / "wandb_id").read_text() == run_id
    logs = sorted((run / "wandb").glob(f"offline-run-*-{run_id}/*.wandb"))
    assert len(logs) == 2
    same_page(run, [row for log in logs for row in rows(log)], stopped_at=marker["step"] * UPDATES)

    whole = tmp_path / "whole"
    assert run_ranks(2, cli.main, [*again.args[3:], f"run.dir={whole}", *UNTRACKED]) == [0, 0]
    for file in ("metrics.jsonl", "steps.jsonl"):
        assert records(run / file) == records(whole / file)


def same_page(run, wandb_rows, stopped_at):
    """Each update once in both trackers, over both jobs; pictures and tables in both, at the same updates."""
    tensorboard = events(run / "tensorboard")
    updates = [record["update"] for record in read_records(run / "metrics.jsonl")]
    assert [int(row["_step"]) for row in wandb_rows] == list(range(len(wandb_rows)))
    for key in ("objective/nll", "step/objective/nll"):
        theirs = [(int(row["update"]), float(row[key])) for row in wandb_rows if key in row]
        ours = [(event.step, event.value) for event in tensorboard.Scalars(key)]
        assert [update for update, _ in theirs] == [update for update, _ in ours]
        assert [value for _, value in theirs] == pytest.approx([value for _, value in ours])
    assert [event.step for event in tensorboard.Scalars("objective/nll")] == updates
    for key, read in (
        ("pictures/curves", lambda key: [event.step for event in tensorboard.Images(key)]),
        ("pictures/step", lambda key: [event.step for event in tensorboard.Images(key)]),
        ("tables/phases", lambda key: [step for step, _ in texts(run / "tensorboard", key)]),
        ("tables/step", lambda key: [step for step, _ in texts(run / "tensorboard", key)]),
    ):
        shown = [int(row["update"]) for row in wandb_rows if f"{key}/path" in row]
        assert shown == sorted(set(shown)) == read(key)
        assert {stopped_at, updates[-1]} <= set(shown)
