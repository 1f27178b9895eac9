"""A scaling sweep over one and two nodes: its jobs, interrupted and cancelled and gone on with, and its report."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megapsft.cluster.slurm import records
from tests.command import ROOT, megapsft
from tests.slurm.runs import CLUSTER, PSFT

pytestmark = pytest.mark.slurm

VARIED = "--vary", "parallel.tensor_model_parallel_size=1,2"
RUN = ["nodes-1_tp-1", "nodes-2_tp-1", "nodes-2_tp-2"]  # one rank a node: on one node there are no two for tp=2


@pytest.fixture
def command(tiny_models, tiny_data, tmp_path) -> list[str]:
    here = [f"model.path={tiny_models('qwen3')}", f"data.path={tiny_data}", "train.batch_size=8", "train.minibatch_size=4"]
    there = ["--out", str(tmp_path / "sweep"), "--steps", "5"]
    return ["sweep", str(PSFT), "--nodes", "1,2", *VARIED, *CLUSTER, *there, *here, "log.tensorboard=false"]


def jobs_of(folder: Path) -> dict[str, list[int]]:
    """Point -> the jobs that it was submitted as."""
    files = folder.glob(f"*/{records.FOLDER}/{records.FILE}")
    return {file.parents[1].name: [int(record.job) for record in records.read(file.parents[1])] for file in files}


def states(folder: Path) -> dict[str, str]:
    return {point["point"]: point["state"] for point in json.loads((folder / "report.json").read_text())["points"]}


def only_once(program: str, folder: Path, search: str) -> Path:
    """A folder with the program as it is for the first call; later ones wait, for who made them to be killed, and fail."""
    path = folder / "once" / program
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\nmkdir "$0.called" && exec {shutil.which(program, path=search)} "$@"\nsleep 60\nexit 1\n')
    path.chmod(0o755)
    return path.parent


def test_a_sweep_that_was_interrupted_submits_what_is_missing_and_reports(command, jobs, tmp_path):
    folder, environment = tmp_path / "sweep", jobs.cluster.environment
    told = os.environ | environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    told["PATH"] = os.pathsep.join([str(only_once("sbatch", tmp_path, told["PATH"])), told["PATH"]])
    with subprocess.Popen([sys.executable, "-m", "megapsft.cli", *command], cwd=ROOT, env=told) as process:
        deadline = time.monotonic() + 120
        while not jobs_of(folder):
            assert process.poll() is None
            assert time.monotonic() < deadline, "nothing was submitted"
            time.sleep(0.01)
        process.kill()
    first = jobs_of(folder)
    for job in [job for numbers in first.values() for job in numbers]:
        jobs.adopt(job)
    assert list(first) == ["nodes-1_tp-1"]

    done = megapsft(*command, **environment)
    assert done.returncode == 0, done.stderr
    second = jobs_of(folder)
    for name in RUN[1:]:
        jobs.adopt(*second[name])
    assert sorted(second) == RUN
    assert second["nodes-1_tp-1"] == first["nodes-1_tp-1"]
    assert [line for line in done.stdout.splitlines() if line.startswith("submitted")] == [
        f"submitted {name} as job {second[name][0]}" for name in RUN[1:]
    ]

    jobs.cluster.slurm("scancel", str(second["nodes-2_tp-2"][0]))
    jobs.wait(second["nodes-2_tp-2"][0])
    done = megapsft(*command, **environment)
    third = jobs_of(folder)
    again = jobs.adopt(third["nodes-2_tp-2"][-1])
    assert third == second | {"nodes-2_tp-2": [*second["nodes-2_tp-2"], again]}
    assert f"submitted nodes-2_tp-2 as job {again}, again: job {second['nodes-2_tp-2'][0]} CANCELLED" in done.stdout

    for name in RUN:
        assert jobs.completes(third[name][-1])["NumNodes"] == name[6]
    done = megapsft(*command, **environment)
    assert done.returncode == 0, done.stderr
    assert "submitted" not in done.stdout
    assert jobs_of(folder) == third
    assert states(folder) == dict.fromkeys(RUN, "done") | {"nodes-1_tp-2": "impossible"}
    one, _, two, _ = json.loads((folder / "report.json").read_text())["points"]
    assert (one["job"], two["job"]) == tuple(str(third[name][-1]) for name in RUN[:2])
    assert two["measured"]["efficiency"] == pytest.approx(
        two["measured"]["tokens_per_second_per_rank"] / one["measured"]["tokens_per_second_per_rank"]
    )
    assert (folder / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert f"{two['measured']['tokens_per_second']:,.0f}" in done.stdout


def test_a_job_that_waits_is_left_alone_and_one_that_is_refused_does_not_stop_the_others(command, jobs, tmp_path):
    folder, environment = tmp_path / "sweep", jobs.cluster.environment
    command = [*command, "cluster.options=['--hold', '--nodelist=node[1-2]']"]  # two nodes, which a job of one cannot have
    done = megapsft(*command, **environment)
    points = json.loads((folder / "report.json").read_text())["points"]
    told = {point["point"]: (point["state"], point["why"]) for point in points}
    assert done.returncode == 2
    assert told["nodes-1_tp-1"][0] == "refused"
    assert "invalid number of nodes" in told["nodes-1_tp-1"][1]
    assert states(folder) == {name: "pending" for name in RUN} | {"nodes-1_tp-1": "refused", "nodes-1_tp-2": "impossible"}
    submitted = jobs_of(folder)
    assert sorted(submitted) == RUN[1:]
    for name in RUN[1:]:
        jobs.adopt(*submitted[name])

    assert megapsft(*command, **environment).returncode == 2
    assert jobs_of(folder) == submitted
    assert megapsft(*command, "--report-only", **environment).returncode == 0
    (held,) = [point for point in json.loads((folder / "report.json").read_text())["points"] if point["point"] == RUN[1]]
    assert (held["state"], held["why"], held["measured"]) == ("pending", "JobHeldUser", None)
