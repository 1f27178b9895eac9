"""One of two ranks stands still: the other one notices, writes its stacks, and ends with an exit code of its own."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from megapsft import cli
from megapsft.platform.hang import HUNG
from tests.ranks import run_ranks
from tests.shipped import FOLDER


def test_a_rank_that_stands_still_ends_the_run(tiny_models, tiny_data, tmp_path):
    run = tmp_path / "run"
    options = [
        f"model.path={tiny_models('qwen3')}", f"data.path={tiny_data}", f"run.dir={run}", "train.steps=1000",
        "train.sft_warmup_steps=0", "train.batch_size=8", "train.minibatch_size=4", "checkpoint.interval=0",
        "parallel.tensor_model_parallel_size=2", "log.tensorboard=false", "train.hang_seconds=5", "train.hang_factor=5",
    ]  # fmt: skip
    arguments = ["train", str(FOLDER / "psft/tiny-qwen3-gsm8k.yaml"), *options]
    with pytest.raises(RuntimeError, match=rf"rank 0 failed \(status {HUNG << 8}\)"):
        run_ranks(2, _stop_the_second, run, arguments)
    (stacks,) = (run / "stacks").iterdir()  # a process that is stopped writes none
    assert stacks.name == "rank-0-0.txt"
    text = stacks.read_text()
    assert "in update" in text or "in train" in text  # where the loop stands
    assert "no update for" in text


def _stop_the_second(run: Path, arguments: list[str]) -> int:
    if os.environ["RANK"] == "1":
        threading.Thread(target=_stand_still_after, args=(run / "metrics.jsonl", 8), daemon=True).start()
    return cli.main(arguments)


def _stand_still_after(metrics: Path, updates: int) -> None:
    while not metrics.exists() or len(metrics.read_bytes().splitlines()) < updates:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGSTOP)
