"""The benchmark of rollouts on figures that are made up: ratios, shares, tables and picture. Not here: servers, and how fast
anything is."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megapsft import cli
from megapsft.report.stored import write_measurement

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "rollout.py"


@pytest.fixture(scope="module")
def rollout():
    spec = importlib.util.spec_from_file_location("benchmark_rollout", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def turn(seconds: float, own: float = 0.0, server: float = 0.0, **more: float) -> dict[str, float]:
    return {"seconds": seconds, "own_cpu_seconds": own, "server_cpu_seconds": server, **more}


@pytest.fixture
def sampled(rollout):
    found = {
        "in process": [turn(seconds, own=1.0, server=0.1, tokens=1000) for seconds in (1.0, 4.0, 2.0)],
        "SGLang": [turn(seconds, own=0.5, server=1.5, tokens=1000) for seconds in (0.5, 8.0, 2.0)],
        "transformers": [turn(seconds, own=2.0, server=0.0, tokens=1000) for seconds in (2.0, 4.0, 1.0)],
    }
    return {"turns": found, **rollout.summary_of_sampling(found)}


@pytest.fixture
def updated(rollout):
    found = {
        name: [turn(seconds, own=seconds, server=9.0, bytes=8e6) for seconds in (0.01, 0.04)]
        for name in ("clone", "copy", "stream")
    }
    for name in (rollout.KEPT, *rollout.WAYS):
        found[name] = [turn(seconds, own=0.1, server=0.2, bytes=8e6, paused_seconds=0.5) for seconds in (0.1, 0.2)]
    return {"bytes": 8e6, "turns": found, "ways": rollout.summary_of_updates(found)}


def test_every_round_begins_with_another(rollout):
    names = ["a", "b", "c"]
    assert [rollout.turns(names, number) for number in (0, 1, 2, 3)] == [names, ["b", "c", "a"], ["c", "a", "b"], names]


def test_ratios_of_sampling_are_of_one_round(sampled):
    rows = sampled["engines"]
    assert rows["transformers"]["over_transformers_range"] == [1.0, 1.0]
    assert rows["in process"]["over_transformers"] == pytest.approx(1.0)  # of 2, 1 and 0.5
    assert rows["SGLang"]["over_transformers"] == pytest.approx(0.5)  # of 4, 0.5 and 0.5; the medians of both are the same
    assert rows["SGLang"]["over_transformers_range"] == pytest.approx([0.5, 4.0])
    assert rows["SGLang"]["tokens_per_second"] == pytest.approx(500.0)


def test_a_servers_cpu_counts_for_its_own_turns(sampled):
    rows = sampled["engines"]
    assert rows["SGLang"]["cpu_seconds_per_1000_tokens"] == pytest.approx(2.0)
    assert rows["in process"]["cpu_seconds_per_1000_tokens"] == pytest.approx(1.0)
    assert sampled["server_cpu_while_others_run"] == pytest.approx(0.3 / 14.0)


def test_updates_are_compared_with_the_clone_of_their_round(rollout, updated):
    ways = updated["ways"]
    assert ways["clone"]["time_over_clone"] == 1.0
    assert ways["disk"]["time_over_clone"] == pytest.approx(7.5)  # of 10 and 5
    assert ways["disk"]["bytes_per_second"] == pytest.approx(60e6)  # of 80 and 40 MB/s
    assert ways["disk"]["cpu_seconds"] == pytest.approx(0.3)
    assert ways["clone"]["cpu_seconds"] == pytest.approx(0.025)
    assert ways["disk"]["paused_seconds"] == 0.5
    assert "paused_seconds" not in ways["clone"]


def test_shares_leave_out_the_first_step(rollout):
    records = [
        {"perf/seconds": seconds, "perf/rollout_wait_seconds": waited, "perf/weight_update_seconds": sent}
        for seconds, waited, sent in ((100.0, 99.0, 1.0), (2.0, 1.0, 0.1), (6.0, 1.0, 0.3))
    ]
    found = rollout.shares(records)
    assert (found["steps"], found["seconds_a_step"]) == (2, pytest.approx(4.0))
    assert (found["sampling"], found["weight_update"]) == (pytest.approx(0.25), pytest.approx(0.05))
    assert found["sampling"] + found["weight_update"] + found["rest"] == pytest.approx(1.0)


def test_its_run_of_grpo_can_start(rollout, tiny_models, tiny_data, tmp_path):
    assert cli.main([*rollout.run_of("inprocess", tiny_models("qwen3"), tiny_data, tmp_path / "run", 3), "--dry-run"]) == 0


def test_cpu_of_a_group_is_of_its_processes_alone(rollout):
    code = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\nprint(flush=True); input()"
    busy = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )  # fmt: skip
    with busy:
        busy.stdout.readline()
        first = rollout.process_group_cpu(busy.pid)
        end = time.process_time() + 0.1  # of this process, which is in another group
        while time.process_time() < end:
            pass
        assert rollout.process_group_cpu(busy.pid) - first <= 2 / os.sysconf("SC_CLK_TCK")
        busy.communicate(b"\n")
    assert first >= 0.25
    assert rollout.process_group_cpu(busy.pid) == 0.0


def test_tables_and_picture(rollout, sampled, updated, tmp_path):
    share = {"steps": 2, "seconds_a_step": 4.0, "sampling": 0.25, "weight_update": 0.05, "rest": 0.7}
    result = {"sampling": sampled, "updates": updated, "steps": {"in process": share, "SGLang": share}}
    text = rollout.tables(result)
    assert "| SGLang | 500 | 0.50 | 0.50 to 4.00 | 2.00 |" in text
    assert "| disk | 0.15 | 60 | 7.5 | 5.0 to 10.0 | 0.30 | 0.50 |" in text
    assert "| in process | 4.00 | 25.0% | 5.0% | 70.0% |" in text
    assert all(len(set(map(lambda line: line.count("|"), part.splitlines()))) == 1 for part in text.split("\n\n"))
    speed, updates, steps = rollout.pictures(result)
    assert dict(zip(speed.names, speed.series[0].values, strict=True))["SGLang"] == pytest.approx(500.0)
    assert dict(zip(updates.names, updates.series[0].values, strict=True))["disk"] == pytest.approx(60.0)
    assert [series.values[0] for series in steps.series] == pytest.approx([25.0, 5.0, 70.0])
    write_measurement(result, [speed, updates, steps], tmp_path / "rollout.json", tmp_path / "rollout.png")
    assert (tmp_path / "rollout.png").stat().st_size > 5_000
