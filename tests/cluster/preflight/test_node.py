"""What a task finds on its node: disks, the shared folder, ports, versions; and the command as srun starts it, on two ranks."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import megapsft
from megapsft.cluster.preflight import node as checks
from megapsft.cluster.preflight import packages
from megapsft.cluster.preflight.finding import Finding, read
from megapsft.platform.launch import rendezvous_port
from tests.command import megapsft as command

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "canary").write_text("7.0\n")
    return tmp_path


def test_room_on_a_disk(tmp_path):
    assert checks.check_disk("run disk", tmp_path, 0.001).good
    found = checks.check_disk("run disk", tmp_path, 1e9)
    assert (found.good, found.rule) == (False, "needs 1e+09 GiB")
    assert not checks.check_disk("run disk", tmp_path / "nowhere", 0.001).good


def test_the_shared_folder_is_the_one_that_the_first_node_wrote_to(folder, monkeypatch):
    monkeypatch.setattr(checks, "CANARY_SECONDS", 0.1)
    assert checks.check_shared(folder, "7.0").good
    stale, gone = checks.check_shared(folder, "7.1"), checks.check_shared(folder / "elsewhere", "7.0")
    assert (stale.good, stale.value) == (False, f"{folder}/canary: '7.0'")
    assert (gone.good, gone.value) == (False, f"{folder}/elsewhere/canary: 'No such file or directory'")


def test_a_port_that_somebody_listens_on_is_named(monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert checks.check_ports(4242, 3).good
    port = rendezvous_port(4242, 7)
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        found = checks.check_ports(4242, 3)
        assert (found.good, found.value) == (False, f"port {port} is taken")
        assert checks.check_ports(4242, 7).good  # the steps after that
        monkeypatch.setenv("MASTER_PORT", str(port))
        assert checks.check_ports(1, 0).value == f"port {port} is taken"


def test_versions_are_those_of_this_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGAPSFT_SGLANG_PYTHON", str(tmp_path / "no-python"))
    found = packages.installed()
    import numpy
    import torch

    assert (found["torch"], found["numpy"]) == (torch.__version__, numpy.__version__)
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["megapsft"] == f"{megapsft.__version__} {packages.source_digest()}"
    assert found["sglang"] == "unknown (FileNotFoundError)"
    packages.record(tmp_path)
    assert json.loads((tmp_path / "packages.json").read_text()) == found


def test_a_changed_line_of_ours_is_another_version(tmp_path):
    shutil.copytree(ROOT / "megapsft", tmp_path / "megapsft", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from megapsft.cluster.preflight.packages import source_digest; print(source_digest())"

    def digest() -> str:
        there = dict(cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)})
        return subprocess.run([sys.executable, "-c", code], **there, capture_output=True, text=True, check=True).stdout

    assert digest().strip() == packages.source_digest()
    with (tmp_path / "megapsft/errors.py").open("a") as file:
        file.write("# changed\n")
    assert digest().strip() != packages.source_digest()


def tasks(folder: Path, count: int, started: int, *options: str, **environment: str) -> tuple[list[int], list[Finding]]:
    """Exit codes and findings of tasks of a step of Slurm on one node, of which only some are started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    told = dict(SLURM_JOB_ID="4242", SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS=str(count), SLURM_STEP_NODELIST="localhost")
    told |= dict(SLURMD_NODENAME="node1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    line = [sys.executable, "-m", "megapsft.cli", "preflight", str(folder), "--token", "7.0", "--run-gib", "0.001", *options]
    running = [
        subprocess.Popen(
            line,
            env=os.environ | told | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} | environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(started)
    ]
    said = [process.communicate()[0] for process in running]
    return [process.returncode for process in running], read("".join(said).splitlines())


def test_two_tasks_sum_up_and_only_the_first_of_the_node_tells(folder):
    codes, found = tasks(folder, 2, 2, "--megabytes", "1", "--seconds", "60")
    assert codes == [0, 0]
    assert all(finding.good and finding.node == "node1" for finding in found)
    told = [finding.check for finding in found if finding.check != "packages"]
    assert told == ["shared folder", "run disk", "temporary disk", "port", "answer", "all-reduce"]
    assert found[-1].value.startswith("1 MiB over 2 ranks in ")
    (folder / "answers").write_text("\n".join(finding.line() for finding in found))
    judged = command("preflight", str(folder), "--judge", "node1")
    assert judged.returncode == 0
    assert judged.stdout.startswith("preflight: 1 nodes are good: 1 MiB over 2 ranks in ")


def test_a_rank_that_never_comes_is_not_waited_for(folder):
    codes, found = tasks(folder, 2, 1, "--seconds", "3")
    assert codes == [1]
    assert (found[-1].check, found[-1].good) == ("all-reduce", False)
    assert found[-1].rule == "must reach all 2 ranks in time"
    (folder / "answers").write_text("\n".join(finding.line() for finding in found))
    judged = command("preflight", str(folder), "--judge", "node1", "node2")
    assert judged.returncode == 69
    assert "preflight: bad: node2" in judged.stdout
    assert (folder / "bad-nodes").read_text() == "node2\n"
