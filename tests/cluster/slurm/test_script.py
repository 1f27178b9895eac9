"""Batch scripts: the header of a cluster's file, the body of launchers/slurm, quoted, and found right by bash and shellcheck."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megapsft.cluster.slurm.config import ClusterConfig, load_cluster
from megapsft.cluster.slurm.script import LAUNCHERS, Script, lint
from megapsft.errors import Refused
from tests.shipped import FOLDER

PLAIN = Script(cluster=ClusterConfig(), name="megapsft", function="train", arguments=("run.yaml",), run=Path("runs/x"))


def header(text: str) -> list[str]:
    return re.findall(r"^#SBATCH (.*)$", text, re.M)


def test_it_says_what_the_plain_file_says():
    """But for where the log and the working folder are."""
    ours = [option for option in header(PLAIN.render()) if not option.startswith(("--output", "--chdir"))]
    plain = [option for option in header((LAUNCHERS / "train.sbatch").read_text()) if not option.startswith("--output")]
    assert sorted(ours) == sorted(plain)
    body = [line for line in (LAUNCHERS / "train.sbatch").read_text().splitlines() if line and not line.startswith("#")]
    assert body[-2:] == ['source "${MEGAPSFT_HOME:-$SLURM_SUBMIT_DIR}/launchers/slurm/job.sh"', 'train "$@"']
    assert PLAIN.render().splitlines()[-2:] == ['source "$MEGAPSFT_HOME/launchers/slurm/job.sh"', "train run.yaml"]


def test_every_key_of_a_cluster_is_in_the_script():
    cluster = ClusterConfig(
        account="a1", partition="p1", qos="q1", reservation="r1", constraint="c1", time="1-00:00:00", gpus_per_node=4,
        ranks_per_node=2, cpus_per_task=7, mem="200G", exclusive=False, signal_seconds=77, mpi="pmix", python="/p/python",
        container="image.sqsh", mounts=("/a:/b", "/c:/d"), preflight=False, options=("--mail-type=FAIL",),
        environment={"NCCL_SOCKET_IFNAME": "ib0 # $(x)"},
    )  # fmt: skip
    script = replace(PLAIN, cluster=cluster, nodes=3, after=("5", "6"), options=("--nodelist=n[1-3]",), export=Path("/e"))
    text = script.render()
    options = header(text)
    for option in (
        "--account=a1", "--partition=p1", "--qos=q1", "--reservation=r1", "--constraint=c1", "--time=1-00:00:00", "--nodes=3",
        "--gpus-per-node=4", "--ntasks-per-node=2", "--cpus-per-task=7", "--mem=200G", "--signal=USR1@77", "--mail-type=FAIL",
        "--dependency=afterok:5:6", "--kill-on-invalid-dep=yes", "--nodelist=n[1-3]",
    ):  # fmt: skip
        assert option in options
    assert "--exclusive" not in options
    exported = dict(shlex.split(line)[1].split("=", 1) for line in text.splitlines() if line.startswith("export "))
    assert exported["MEGAPSFT_PYTHON"] == "/p/python"
    assert exported["MEGAPSFT_SRUN"] == "--mpi=pmix --container-image=image.sqsh --container-mounts=/a:/b,/c:/d"
    assert exported["MEGAPSFT_PREFLIGHT"] == "0"
    assert exported["MEGAPSFT_EXPORT"] == "/e"
    assert exported["NCCL_SOCKET_IFNAME"] == "ib0 # $(x)"  # no shell reads it
    assert lint(text)


@pytest.mark.parametrize(
    ("cluster", "interpreter"),
    [
        (ClusterConfig(), sys.executable),  # of any environment, not only .venv
        (ClusterConfig(container="image.sqsh"), "python3"),
        (ClusterConfig(container="image.sqsh", python="/opt/python"), "/opt/python"),
    ],
)
def test_a_job_runs_the_interpreter_that_submitted_it_or_the_containers(cluster, interpreter):
    assert f"export MEGAPSFT_PYTHON={interpreter}\n" in replace(PLAIN, cluster=cluster).render()


def test_servers_on_nodes_of_their_own_are_the_second_part_of_a_job():
    text = replace(PLAIN, nodes=4, rollout_nodes=2).render()
    trainers, servers = text.split("#SBATCH hetjob\n")
    assert "--nodes=4" in header(trainers)
    assert "--nodes=2" in header(servers)
    assert "--ntasks-per-node=1" in header(servers)
    assert lint(text)


@pytest.mark.parametrize("argument", ["a b", "$(touch x)", "`id`", "'", '"', "key=[1, 2]", "; exit 1"])
def test_arguments_reach_megapsft_as_they_are(argument, tmp_path):
    text = replace(PLAIN, arguments=("run.yaml", argument)).render()
    (tmp_path / "launchers/slurm").mkdir(parents=True)
    (tmp_path / "launchers/slurm/job.sh").write_text('train() { printf "%s\\n" "$2"; }\n')
    text = re.sub(r"^export MEGAPSFT_HOME=.*$", f"export MEGAPSFT_HOME={shlex.quote(str(tmp_path))}", text, flags=re.M)
    done = subprocess.run(["bash", "-s"], input=text, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == f"{argument}\n"
    assert lint(text)


def test_a_script_that_no_shell_would_read_is_refused():
    with pytest.raises(Refused, match="bash says"):
        lint("if true\n")
    with pytest.raises(Refused, match="more than one line"):
        replace(PLAIN, options=("--comment=a\n#SBATCH --nodes=9",)).render()


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("time=soon", "is not a time limit"),
        ("partition='a b'", "is not one word"),
        ("container=--x", "is not one word"),
        ("options=[nodes]", "is not an option of sbatch"),
        ("options=['--signal=TERM']", "is set by megapsft submit"),
        ("options=['--comment=a#b']", "is not an option of sbatch"),
        ("environment={'A B': x}", "is no variable of a shell"),
        ("mounts=['/a:/b']", "are of a container"),
        ("gpus_per_node=2", "is more than gpus_per_node=2"),
        ("partitoin=x", "is not a config key"),
        ("gpus_per_node=-1", "gpus_per_node"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(override, rule):
    with pytest.raises(Refused, match=re.escape(rule)):
        load_cluster(None, [override, *(["ranks_per_node=3"] if override == "gpus_per_node=2" else [])])


def test_a_time_that_yaml_takes_for_a_number(tmp_path):
    (tmp_path / "my.yaml").write_text("time: 4:00:00\n")
    with pytest.raises(Refused, match="in quotes"):
        load_cluster(tmp_path / "my.yaml")
    assert load_cluster(None, ["time=4:00:00"]).time == "4:00:00"


@pytest.mark.parametrize("path", sorted((FOLDER / "cluster").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_clusters_load(path):
    assert lint(replace(PLAIN, cluster=load_cluster(path)).render())


@pytest.mark.parametrize("path", sorted(LAUNCHERS.iterdir()), ids=lambda path: path.name)
def test_launchers_are_found_right(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "/home/" not in path.read_text()
