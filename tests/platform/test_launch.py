"""Who starts the ranks: torchrun, srun or nobody. Subprocesses, because the environment is theirs to change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import megapsft

ROOT = Path(__file__).parents[2]
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
JOINED = f"""
import json, os
from megapsft.platform.launch import joined_world
print(json.dumps([joined_world(), {{name: os.environ.get(name) for name in {NAMES}}}]))
"""
SRUN = dict(
    SLURM_PROCID="5", SLURM_LOCALID="1", SLURM_STEP_NUM_TASKS="8", SLURM_STEP_NODELIST="node[07-09,12]", SLURM_JOB_ID="4242",
    SLURM_STEP_ID="3", SLURM_NTASKS="8",
)  # fmt: skip


def python(code: str, **environment: str) -> str:
    plain = {name: value for name, value in os.environ.items() if name not in NAMES and not name.startswith("SLURM_")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=plain | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def joined(**environment: str) -> tuple[int | None, dict[str, str | None]]:
    return json.loads(python(JOINED, **environment))


def test_the_environment_of_srun_is_completed_for_torch():
    world, environment = joined(**SRUN)
    assert world == 8
    port = int(environment.pop("MASTER_PORT"))
    assert 20000 <= port < 32000
    assert environment == {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "node07"}


def test_ranks_of_a_step_agree_on_the_port_and_steps_do_not():
    ports = [joined(**SRUN | changes)[1]["MASTER_PORT"] for changes in ({}, {"SLURM_PROCID": "0"}, {"SLURM_STEP_ID": "4"})]
    assert ports[0] == ports[1] != ports[2]


def test_what_the_user_sets_stays():
    environment = joined(**SRUN, MASTER_ADDR="10.0.0.1", MASTER_PORT="12345")[1]
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "12345")


def test_torchrun_goes_before_srun():
    world, environment = joined(**SRUN, RANK="1", WORLD_SIZE="2")
    assert world == 2
    assert (environment["RANK"], environment["MASTER_ADDR"]) == ("1", None)


@pytest.mark.parametrize(
    "environment",
    [{}, {"SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}, SRUN | {"SLURM_STEP_NUM_TASKS": "1"}],
    ids=["a shell", "an sbatch script", "srun of one"],
)
def test_alone(environment):
    world, after = joined(**environment)
    assert world is None
    assert set(after.values()) == {None}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[1-4]", "node1"),
        ("node[07-09,12],other", "node07"),
        ("node[3,5]", "node3"),
        ("node[1-2]-ib", "node1-ib"),
        ("gpu-a-[001-016]", "gpu-a-001"),
        ("n1.cluster.example", "n1.cluster.example"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, first):
    from megapsft.platform.launch import _first_host

    assert _first_host(nodes) == first


def test_an_empty_node_list_is_refused(tmp_path):
    environment = SRUN | {"SLURM_STEP_NODELIST": "", "SLURM_PROCID": "0"}
    done = megapsft("train", str(ROOT / "configs/tiny.yaml"), cwd=tmp_path, **environment)
    assert (done.returncode, done.stderr) == (2, "megapsft: SLURM_STEP_NODELIST='': names no host; set MASTER_ADDR\n")


def test_a_world_of_one_is_one():
    code = """
import os, torch
from megapsft.platform.launch import become_world_of_one
become_world_of_one()
torch.distributed.init_process_group("gloo")
value = torch.ones(1)
torch.distributed.all_reduce(value)
print(torch.distributed.get_rank(), torch.distributed.get_world_size(), value.item(), os.environ["MASTER_ADDR"])
"""
    assert python(code).split() == ["0", "1", "1.0", "127.0.0.1"]
