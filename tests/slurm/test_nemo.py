"""Jobs through nemo-run: what they say is what sbatch's say, and they train, stop and go on like them."""

from __future__ import annotations

import json

import pytest

from tests.command import megapsft
from tests.slurm.runs import CLUSTER, PSFT, measured, on, options, submit

pytestmark = pytest.mark.slurm

TP = "parallel.tensor_model_parallel_size=2"


def test_its_script_has_the_same_header(tiny_models, tiny_data, tmp_path):
    """Options, environment, what is readied before the ranks, and what each of them is; nothing is left behind."""
    given = (
        *CLUSTER, str(PSFT), "--nodes", "2", "--after", "7", "--option=--exclude=node9", "--dry-run", "cluster.account=me",
        "cluster.partition=gpu", "cluster.exclusive=true", "cluster.mem=200G", "cluster.gpus_per_node=8", "cluster.mpi=pmi2",
        "cluster.ranks_per_node=4", "cluster.cpus_per_task=3", "cluster.environment={letters: a b $HOME}",
        *options(tiny_models("qwen3"), tiny_data, tmp_path / "run", TP),
    )  # fmt: skip
    ours, theirs = (megapsft("submit", *given, "--via", via) for via in ("sbatch", "nemo-run"))
    assert theirs.returncode == 0, theirs.stderr
    headers = [{line for line in said.stdout.splitlines() if line.startswith("#SBATCH")} for said in (ours, theirs)]
    assert headers[0] == headers[1]
    assert len(headers[0]) == 18
    exports = [{line for line in said.stdout.splitlines() if line.startswith("export ME")} for said in (ours, theirs)]
    assert exports[0] == exports[1] > set()
    assert "export letters='a b $HOME'" in theirs.stdout
    (srun,) = (line for line in theirs.stdout.splitlines() if line.startswith("srun"))
    for option in ("--wait=60", "--kill-on-bad-exit=1", "--mpi=pmi2", "--cpus-per-task=3", '--output="$ATTEMPT/rank-%t.log"'):
        assert f" {option} " in srun
    assert srun.endswith('"${OVERRIDES[@]}"')
    assert not (tmp_path / "run").exists()


def test_two_nodes_stopped_and_requeued_train_what_one_does(jobs, tiny_models, tiny_data, tmp_path):
    def given(run: str) -> list[str]:
        return options(tiny_models("qwen3"), tiny_data, tmp_path / run, TP, "train.steps=8", "checkpoint.interval=1000")

    one = megapsft("train", str(PSFT), "--nproc-per-node", "2", *given("one"))
    assert one.returncode == 0, one.stderr
    job = submit(jobs, str(PSFT), "--nodes", "2", *on("node1", "node2"), "--via", "nemo-run", *given("two"))
    metrics = tmp_path / "two/metrics.jsonl"
    jobs.wait_for(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 4, job)
    jobs.cluster.slurm("scancel", "--signal=USR1", str(job))  # as Slurm does before the time is over
    shown = jobs.completes(job)
    assert (shown["NodeList"], shown["Restarts"]) == ("node[1-2]", "1")
    assert measured(tmp_path / "two") == measured(tmp_path / "one")
    for restart in range(2):
        logs = (tmp_path / "two/slurm" / f"{job}.{restart}").glob("rank-*.log")
        assert {path.name for path in logs} == {"rank-0.log", "rank-1.log"}
    told = json.loads(megapsft("status", str(tmp_path / "two"), "--json", **jobs.cluster.environment).stdout)
    assert [(one["id"], one["state"]) for one in told["jobs"]] == [(str(job), "COMPLETED")]


def test_what_it_refuses(jobs, tiny_models, tiny_data, tmp_path):
    """Before anything is queued, and what sbatch refuses, in its words."""
    given = (*CLUSTER, str(PSFT), "--via", "nemo-run", *options(tiny_models("qwen3"), tiny_data, tmp_path / "run"))
    short = megapsft("submit", *given, "--option=-x node9", **jobs.cluster.environment)
    assert short.returncode == 2
    assert "-x node9: is not --name=value" in short.stderr
    unknown = megapsft("submit", *given, "cluster.partition=nowhere", **jobs.cluster.environment)
    assert unknown.returncode == 2
    assert "invalid partition specified: nowhere" in unknown.stderr
