"""Killed in the middle of an update and started again, a run is the one that was never stopped, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEPS, WARMUP, UPDATES = 10, 2, 4


@pytest.mark.parametrize(
    ("family", "split"),
    [
        ("qwen3", ["parallel.tensor_model_parallel_size=2"]),
        ("qwen3_moe", ["parallel.expert_model_parallel_size=2", "parallel.use_distributed_optimizer=true"]),
    ],
    ids=["tp2", "moe-ep2-zero1"],
)
def test_sigkill_and_start_again(family, split, tiny_models, tiny_data, tmp_path):
    whole = start(tiny_models(family), tiny_data, tmp_path / "whole", split)
    assert whole.wait(timeout=300) == 0, whole.stderr.read()

    killed = start(tiny_models(family), tiny_data, tmp_path / "killed", split)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    wait_for(lambda: count(metrics) >= 6 * UPDATES and (tmp_path / "killed/checkpoints/latest").exists(), killed)
    family_of_processes = descendants(killed.pid)
    assert len(family_of_processes) >= 2  # two ranks, and what may be writing a checkpoint at this moment
    killed.kill()  # SIGKILL for the launcher alone: its ranks go with it, and theirs with them
    killed.wait()
    wait_until_gone(family_of_processes)
    written = count(metrics)
    assert written < (STEPS + WARMUP) * UPDATES, "the run ended before it could be killed"

    again = start(tiny_models(family), tiny_data, tmp_path / "killed", split)
    assert again.wait(timeout=300) == 0, again.stderr.read()
    assert records(metrics) == records(tmp_path / "whole" / "metrics.jsonl")
    assert records(tmp_path / "killed" / "steps.jsonl") == records(tmp_path / "whole" / "steps.jsonl")

    done = start(tiny_models(family), tiny_data, tmp_path / "killed", split)  # once more: nothing is left to do
    assert done.wait(timeout=300) == 0
    assert records(metrics) == records(tmp_path / "whole" / "metrics.jsonl")


def start(model: Path, data: Path, run: Path, split: list[str]) -> subprocess.Popen:
    """`megapsft train`, in a process group of its own."""
    options = [
        f"model.path={model}", f"data.path={data}", f"run.dir={run}", f"train.steps={STEPS}", f"train.sft_warmup_steps={WARMUP}",
        "train.sft_warmup_lr=1e-3", "train.batch_size=16", f"train.minibatch_size={16 // UPDATES}", "checkpoint.interval=2",
        "log.tensorboard=false", *split,
    ]  # fmt: skip
    config = Path(__file__).parents[2] / "configs/psft/tiny-qwen3-gsm8k.yaml"
    command = [sys.executable, "-m", "megapsft.cli", "train", str(config), *options]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def descendants(process: int) -> dict[int, str]:
    """Process id -> when it was started, of all children and theirs."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it ended in between
            continue
        parents[int(path.parent.name)] = (int(fields[1]), fields[19])
    found, left = {}, {process}
    while left:
        left = {child for child, (parent, _) in parents.items() if parent in left}
        found |= {child: parents[child][1] for child in left}
    return found


def wait_until_gone(processes: dict[int, str], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while alive := [process for process, began in processes.items() if started(process) == began]:
        assert time.monotonic() < deadline, f"outlived the run: {[Path(f'/proc/{p}/cmdline').read_text() for p in alive]}"
        time.sleep(0.05)


def started(process: int) -> str | None:
    """When a process was started; None where it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def wait_for(condition, process: subprocess.Popen, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended on its own: {process.stderr.read()}"
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.01)


def count(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def records(path: Path) -> list[dict]:
    """All that was recorded, but how long it took."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in record.items() if not key.startswith("perf/")} for record in lines]
