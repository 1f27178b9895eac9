"""Jobs over two nodes, submitted as a user does: they train what one node trains, and can be followed, stopped and cancelled."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.command import ROOT, megapsft
from tests.slurm.runs import CLUSTER, PSFT, measured, on, options, submit

pytestmark = pytest.mark.slurm

SPLITS = {"tp2": "parallel.tensor_model_parallel_size=2", "pp2": "parallel.pipeline_model_parallel_size=2"}


@pytest.mark.parametrize("split", SPLITS)
def test_two_nodes_train_what_one_does(split, jobs, tiny_models, tiny_data, tmp_path):
    model = tiny_models("qwen3")
    job = submit(
        jobs, str(PSFT), "--nodes", "1", "cluster.ranks_per_node=2", *on("node1"),
        *options(model, tiny_data, tmp_path / "one", SPLITS[split]),
    )  # fmt: skip
    jobs.completes(job)

    environment = f"--export=ALL,MEGAPSFT_PYTHON={sys.executable}"
    plain = jobs.sbatch(
        "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--nodelist=node1,node2", "--oversubscribe", environment,
        f"--chdir={ROOT}", f"--output={tmp_path}/%j.log", "launchers/slurm/train.sbatch", str(PSFT),
        *options(model, tiny_data, tmp_path / "plain", SPLITS[split]),
    )  # fmt: skip
    assert jobs.completes(plain)["NodeList"] == "node[1-2]"
    given = options(model, tiny_data, tmp_path / "two", SPLITS[split])
    two = submit(jobs, str(PSFT), "--nodes", "2", "--via", "nemo-run", *on("node1", "node2"), *given)
    assert jobs.completes(two)["NodeList"] == "node[1-2]"
    for run, number in (("plain", plain), ("two", two)):
        assert measured(tmp_path / run) == measured(tmp_path / "one")
        assert len(measured(tmp_path / run)[0]) == 20
        logs = tmp_path / run / "slurm" / f"{number}.0"
        assert {path.name for path in logs.glob("rank-*.log")} == {"rank-0.log", "rank-1.log"}

    done = megapsft("status", str(tmp_path / "two"), "--json", **jobs.cluster.environment)
    told = json.loads(done.stdout)
    assert [one["state"] for one in told["jobs"]] == ["COMPLETED"]
    assert told["finished"]
    assert (told["progress"]["steps"], told["progress"]["of"]) == (5, 5)


def test_a_rank_that_fails_is_named_with_what_it_said(jobs, tiny_models, tiny_data, tmp_path):
    """It is not requeued, and its log comes first; in a folder whose name has a space."""
    (tmp_path / "broken.py").write_text(
        "import os\nfrom dataclasses import dataclass\nfrom megapsft.objectives.psft import PSFT\n\n\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Broken(PSFT):\n    def __call__(self, output, batch):\n"
        "        if os.environ['RANK'] == '1':\n            raise RuntimeError('a bit has flipped')\n"
        "        return super().__call__(output, batch)\n"
    )
    run = tmp_path / "a run"
    given = options(tiny_models("qwen3"), tiny_data, run, SPLITS["tp2"], f"objective.name={tmp_path / 'broken.py'}")
    job = submit(jobs, str(PSFT), "--nodes", "2", *on("node1", "node2"), *given)
    shown = jobs.wait(job)
    assert (shown["JobState"], shown["Restarts"]) == ("FAILED", "0")
    log = (run / f"slurm/{job}.log").read_text()
    for text in (log, megapsft("logs", str(run), **jobs.cluster.environment).stdout):
        assert "rank 1 on node2 ended with exit code 1" in text
        assert "RuntimeError: a bit has flipped" in text


def test_stopped_by_hand_and_gone_on(jobs, tiny_models, tiny_data, tmp_path):
    """`cancel --save` saves and is not requeued; submitted again the run goes on; a second job of a run is refused meanwhile."""
    run = tmp_path / "run"
    given = options(tiny_models("qwen3"), tiny_data, run, "train.steps=400", "optimizer.lr_decay_style=constant")
    job = submit(jobs, str(PSFT), "--nodes", "1", *on("node1"), *given)
    jobs.wait_for(lambda: (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").read_text().count("\n") > 8, job)
    second = megapsft("submit", *CLUSTER, str(PSFT), *given, **jobs.cluster.environment)
    assert second.returncode == 2
    assert f"job {job}: is RUNNING, and of the same run.dir" in second.stderr
    done = megapsft("cancel", str(run), "--save", **jobs.cluster.environment)
    assert done.stdout == f"job {job}: ends after its step, saved\n"
    shown = jobs.completes(job)
    assert shown["Restarts"] == "0"
    step = json.loads((run / "stopped.json").read_text())["step"]
    assert os.readlink(run / "checkpoints/latest") == f"step-{step:08d}"

    again = submit(jobs, str(PSFT), "--nodes", "1", *on("node1"), *given, f"train.steps={step + 2}")
    jobs.completes(again)
    assert len((run / "steps.jsonl").read_text().splitlines()) == step + 3  # one of the warm-up
    assert not (run / "stopped.json").exists()
    assert megapsft("cancel", str(run), **jobs.cluster.environment).stdout == f"{run}: no job of it waits or runs\n"


def test_cancelled_while_it_waits_and_while_it_runs(jobs, tiny_models, tiny_data, tmp_path):
    given = options(tiny_models("qwen3"), tiny_data, tmp_path / "run", "train.steps=400")
    other = jobs.submit("sleep 300", "--nodelist=node1", "--exclusive")
    jobs.wait(other, lambda shown: shown["JobState"] == "RUNNING")
    job = submit(jobs, str(PSFT), "--nodes", "1", *on("node1"), *given)
    jobs.wait(job, lambda shown: shown["JobState"] == "PENDING")
    assert megapsft("cancel", str(tmp_path / "run"), **jobs.cluster.environment).stdout == f"job {job}: cancelled\n"
    assert jobs.wait(job)["JobState"] == "CANCELLED"
    assert jobs.show(other)["JobState"] == "RUNNING"  # nobody else's job was touched
    jobs.cancel()


def test_an_array_is_a_run_for_each_number(jobs, tiny_models, tiny_data, tmp_path):
    given = options(tiny_models("qwen3"), tiny_data, tmp_path / "seed-%a", "train.seed=%a", "train.steps=1")
    job = jobs.sbatch(
        "--array=1-2", "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0", "--nodelist=node1", "--oversubscribe",
        f"--export=ALL,MEGAPSFT_PYTHON={sys.executable}", f"--chdir={ROOT}", f"--output={tmp_path}/%j.log",
        "launchers/slurm/train.sbatch", str(PSFT), *given,
    )  # fmt: skip
    for task in (1, 2):
        jobs.completes(f"{job}_{task}")
        run = tmp_path / f"seed-{task}"
        assert f"seed: {task}\n" in (run / "config.yaml").read_text()
        (told,) = json.loads(megapsft("status", str(run), "--json", **jobs.cluster.environment).stdout)["jobs"]
        assert told["state"] == "COMPLETED"
    assert measured(tmp_path / "seed-1") != measured(tmp_path / "seed-2")


def test_a_command_as_a_job(jobs, tiny_data, tmp_path):
    """launchers/slurm/run.sbatch."""
    job = jobs.sbatch(
        "--gpus-per-node=0", "--nodelist=node1", f"--export=ALL,MEGAPSFT_PYTHON={sys.executable},MEGAPSFT_RUN={tmp_path}/logs",
        f"--chdir={ROOT}", f"--output={tmp_path}/%j.log", "launchers/slurm/run.sbatch",
        "make-data", "--out", str(tmp_path / "made data.jsonl"), "--count", "3",
    )  # fmt: skip
    jobs.completes(job)
    assert len((tmp_path / "made data.jsonl").read_text().splitlines()) == 3
    assert "wrote 3 problems" in Path(tmp_path / f"logs/slurm/{job}.0/rank-0.log").read_text()
