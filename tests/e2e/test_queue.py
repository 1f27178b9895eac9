"""SIGUSR1 to all processes of a run, as a batch system sends it before the time is over; then the same command again."""

from __future__ import annotations

import contextlib
import json
import os
import signal

from megapsft import cli
from megapsft.train.stop import STOPPED
from tests.e2e.test_kill import UPDATES, count, descendants, records, start, wait_for, wait_until_gone
from tests.ranks import run_ranks

SPLIT = ["parallel.tensor_model_parallel_size=2", "checkpoint.interval=2", "train.steps=6", "log.wandb=offline"]


def test_signalled_and_requeued(tiny_models, tiny_data, tmp_path):
    model, run = tiny_models("qwen3"), tmp_path / "run"
    first = start(model, tiny_data, run, SPLIT)
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

    again = start(model, tiny_data, run, SPLIT)
    assert again.wait(timeout=300) == 0, again.stderr.read()
    assert not (run / "stopped.json").exists()
    (run_id,) = {folder.name.rsplit("-", 1)[1] for folder in (run / "wandb").glob("offline-run-*")}
    assert len(list((run / "wandb").glob(f"offline-run-*-{run_id}"))) == 2
    assert (run / "wandb_id").read_text() == run_id

    whole = tmp_path / "whole"
    assert run_ranks(2, cli.main, [*again.args[3:], f"run.dir={whole}", "log.wandb=disabled"]) == [0, 0]
    for file in ("metrics.jsonl", "steps.jsonl"):
        assert records(run / file) == records(whole / file)
