"""A run that is asked to stop: it is saved, says why, and goes on as the one that was never stopped, bit for bit.

Not here: real signals and a real launcher (tests/e2e/test_queue.py).
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist

from megapsft import cli
from megapsft.data.arithmetic import generate, write_jsonl
from megapsft.platform.held_signal import HeldSignal
from megapsft.train.stop import STOPPED, Stop, ask, was_stopped
from tests.ranks import run_ranks
from tests.shipped import FOLDER

QUIET = ["log.progress=false", "log.tensorboard=false"]
AT_ONCE = "run.stop_after=1e-9"  # after one step, however fast it is


def test_what_one_rank_knows_stops_all(tmp_path):
    assert run_ranks(2, _ask_in_turn, tmp_path) == [[None, "time", "file", "signal", "signal"]] * 2


def _ask_in_turn(folder: Path) -> list[str | None]:
    held = HeldSignal(signal.SIGUSR1)  # first, as in a run: gloo's threads would let it through, and note it a moment later
    dist.init_process_group("gloo")
    rank, device, found = dist.get_rank(), torch.device("cpu"), []
    found.append(Stop(folder, 60.0, held.came).asked(device))
    stop = Stop(folder, 0.0 if rank == 0 else None, held.came)
    found.append(stop.asked(device))
    if rank == 0:
        ask(folder)
    found.append(stop.asked(device))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    found += [stop.asked(device), stop.asked(device)]
    dist.destroy_process_group()
    return found


def test_a_request_is_settled_once(tmp_path):
    ask(tmp_path / "run")
    stop = Stop(tmp_path / "run", None, lambda: False)
    stop.settle(3, "file")
    assert was_stopped(tmp_path / "run")
    assert json.loads((tmp_path / "run/stopped.json").read_text()) == {"step": 3, "reason": "file"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"stopped.json"}
    stop.settle(4, None)  # there is no request, and nothing to say


def test_after_the_warm_up_and_beside_a_reference_by_a_file_that_was_there_before(tiny_models, tiny_data, tmp_path):
    def train(run: str) -> list[int]:
        options = [
            f"model.path={tiny_models('qwen3')}", f"data.path={tiny_data}", f"run.dir={tmp_path / run}", "train.steps=2",
            "train.sft_warmup_steps=1", "train.batch_size=8", "train.minibatch_size=4", "checkpoint.interval=0",
            "objective.name=sft_kl", "objective.kl_coef=0.1", *QUIET,
        ]  # fmt: skip
        return run_ranks(1, cli.main, ["train", str(FOLDER / "psft/tiny-qwen3-gsm8k.yaml"), *options])

    assert train("whole") == [0]
    run = tmp_path / "stopped"
    for step in (1, 2):
        ask(run)
        assert train("stopped") == [0]  # or torchrun would take it for a failure
        assert json.loads((run / "stopped.json").read_text()) == {"step": step, "reason": "file"}
        assert os.readlink(run / "checkpoints/latest") == f"step-{step:08d}"
        assert not (run / "stop").exists()
    assert train("stopped") == [0]
    assert not was_stopped(run)
    assert_same_records(run, tmp_path / "whole", "metrics.jsonl", "steps.jsonl")


def test_every_step_of_rl_with_a_critic_by_the_clock(tiny_models, tmp_path):
    sums = tmp_path / "sums.jsonl"
    write_jsonl(sums, generate(16, 3, "easy"))

    def train(run: str, *more: str) -> int:
        options = [
            f"model.path={tiny_models('qwen3')}", f"data.path={sums}", f"run.dir={tmp_path / run}", "train.steps=3",
            "critic.warmup_steps=1", "train.batch_size=4", "train.minibatch_size=2", "rollout.n=2", "rollout.max_tokens=12",
            "rewards=[{name: length, soft_limit: 4, price: 0.1}]", "checkpoint.interval=0", f"evaluate.data=[{sums}]",
            "evaluate.interval=2", "evaluate.limit=4", "evaluate.max_tokens=12", "evaluate.reward=length", *QUIET, *more,
        ]  # fmt: skip
        (code,) = run_ranks(1, _alone, ["train", str(FOLDER / "ppo/tiny-qwen3-arithmetic.yaml"), *options])
        return code

    assert train("whole") == 0
    for step in (1, 2, 3):  # after the last one the benchmarks are still to be answered
        assert train("stopped", AT_ONCE) == STOPPED == 75
        assert json.loads((tmp_path / "stopped/stopped.json").read_text()) == {"step": step, "reason": "time"}
    assert train("stopped", AT_ONCE) == 0  # nothing is left to stop
    assert not was_stopped(tmp_path / "stopped")
    assert_same_records(tmp_path / "stopped", tmp_path / "whole", "metrics.jsonl", "steps.jsonl", "evaluations.jsonl")


def _alone(arguments: list[str]) -> int:
    """As a process that nobody launched."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]
    return cli.main(arguments)


def assert_same_records(run: Path, other: Path, *files: str) -> None:
    """All that was recorded, but how long it took."""
    for file in files:
        found, expected = ([json.loads(line) for line in (folder / file).read_text().splitlines()] for folder in (run, other))
        assert expected
        for record in (*found, *expected):
            for key in [key for key in record if key.startswith("perf/") or key == "rollout/tokens_per_second"]:
                del record[key]
        assert found == expected
