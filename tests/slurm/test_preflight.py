"""The checks of a job's nodes, on real ones: good ones go on, a bad one is named and excluded, and where no node is to blame the
job ends. Not here: GPUs (tests/cluster/preflight).
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.slurm.jobs import ROOT
from tests.slurm.runs import PSFT, measured, options
from tests.slurm.runs import submit as submit_run

pytestmark = pytest.mark.slurm

JOB = f"""
export MEGAPSFT_HOME={ROOT} MEGAPSFT_PYTHON={sys.executable} MEGAPSFT_PREFLIGHT_SECONDS=40
set +e
source {ROOT}/launchers/slurm/job.sh
open_attempt $1
preflight
echo "ranks on $SLURM_JOB_NODELIST"
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def submit(jobs, run: Path, *options: str, body: str = JOB) -> int:
    return jobs.submit(body.replace("$1", str(run)), "--requeue", "--ntasks-per-node=2", *options)


def verdict(run: Path, job: int, restart: int = 0) -> dict:
    return json.loads((run / f"slurm/{job}.{restart}/preflight/verdict.json").read_text())


@contextmanager
def another_version(cluster, node: str, package: str, folder: Path) -> Iterator[None]:
    """On that node alone the package is of version 9.9.9, as far as its metadata says."""
    metadata = Path(importlib.metadata.distribution(package)._path) / "METADATA"
    old = importlib.metadata.version(package)
    (folder / "METADATA").write_text(metadata.read_text().replace(f"\nVersion: {old}\n", "\nVersion: 9.9.9\n", 1))
    cluster.on(node, "mount", "--bind", str(folder / "METADATA"), str(metadata))
    try:
        yield
    finally:
        cluster.on(node, "umount", str(metadata))


@contextmanager
def not_shared(cluster, node: str, folder: Path) -> Iterator[None]:
    """That node sees another folder there, an empty one of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    cluster.on(node, "mount", "-t", "tmpfs", "tmpfs", str(folder))
    try:
        yield
    finally:
        cluster.on(node, "umount", "--lazy", str(folder))


@contextmanager
def firewall(cluster, node: str) -> Iterator[None]:
    """What that node sends from and to the ports at which ranks meet is dropped; Slurm's own are open."""
    rules = [("ipproto", "tcp", which, "20000-32000", "blackhole") for which in ("sport", "dport")]
    for rule in rules:
        cluster.on(node, "ip", "rule", "add", *rule)
    try:
        yield
    finally:
        for rule in rules:
            cluster.on(node, "ip", "rule", "del", *rule)


def test_good_nodes_go_on(jobs, run):
    job = submit(jobs, run, "--nodes=2", "--nodelist=node1,node2")
    jobs.completes(job)
    log = jobs.log(job).read_text()
    assert "preflight: 2 nodes are good: 8 MiB over 4 ranks in " in log
    assert "ranks on node[1-2]\n" in log


def test_a_node_with_another_version_is_excluded_and_the_run_goes_on_under_its_number(
    cluster, jobs, run, tiny_models, tiny_data, tmp_path
):
    """Two nodes cannot tell which of them is right: the machine that submitted can."""
    given = options(tiny_models("qwen3"), tiny_data, run, "parallel.tensor_model_parallel_size=2")
    with another_version(cluster, "node1", "transformers", tmp_path):
        wanted = ("--nodes", "2", "--option=--exclude=node4,node5,node6", "cluster.preflight=true")
        job = submit_run(jobs, str(PSFT), *wanted, *given)
        shown = jobs.completes(job)
    assert (shown["Restarts"], shown["NodeList"]) == ("1", "node[2-3]")
    found = verdict(run, job)
    assert found["bad"] == ["node1"]
    (wrong,) = found["wrong"]
    assert (wrong["node"], wrong["value"]) == ("node1", "transformers 9.9.9")
    assert wrong["rule"].endswith("as where the job was submitted")
    log = jobs.log(job).read_text()
    assert "preflight: bad: node1\n" in log
    assert "preflight: 2 nodes are good" in log
    assert len(measured(run)[0]) == 20


def test_a_node_that_does_not_share_the_folder_is_bad(cluster, jobs, run):
    with not_shared(cluster, "node2", run):
        job = submit(jobs, run, "--nodes=2", "--exclude=node4,node5,node6")
        shown = jobs.completes(job)
    assert (shown["Restarts"], shown["NodeList"]) == ("1", "node[1,3]")
    assert {(finding["node"], finding["check"]) for finding in verdict(run, job)["wrong"]} == {("node2", "shared folder")}


@pytest.mark.parametrize(
    ("where", "before", "said"),
    [
        ("--nodelist=node1,node2", "", "cannot run elsewhere, since it was submitted with --nodelist=node[1-2]; bad: node2"),
        ("--exclude=node4,node5,node6", "a\\nb\\nc\\n", "nodes were excluded three times, and there are bad ones again: node2"),
    ],
    ids=["named", "thrice"],
)
def test_a_job_that_cannot_do_without_its_bad_node_ends(where, before, said, cluster, jobs, run):
    body = JOB.replace("\npreflight\n", f"\nprintf '{before}' >$RUN/slurm/$SLURM_JOB_ID.excluded\npreflight\n")
    with not_shared(cluster, "node2", run):
        job = submit(jobs, run, "--nodes=2", where, body=body)
        shown = jobs.wait(job)
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("FAILED", "69:0", "0")
    assert said in jobs.log(job).read_text()


def test_a_node_that_the_others_do_not_reach_is_found_by_pairs(cluster, jobs, run):
    with firewall(cluster, "node3"):
        job = submit(jobs, run, "--nodes=3", "--exclude=node5,node6")
        shown = jobs.completes(job)
    assert (shown["Restarts"], shown["NodeList"]) == ("1", "node[1-2,4]")
    assert verdict(run, job)["bad"] == ["node3"]


def test_between_two_nodes_nobody_is_to_blame(cluster, jobs, run):
    with firewall(cluster, "node2"):
        job = submit(jobs, run, "--nodes=2", "--nodelist=node1,node2")
        shown = jobs.wait(job)
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("FAILED", "76:0", "0")
    log = jobs.log(job).read_text()
    assert "something is wrong, and no node is to blame for it" in log
    assert "ranks on" not in log
