"""The cluster itself: jobs on several nodes, ranks that join each other, and nodes with a network and mounts of their own."""

from __future__ import annotations

import pytest

from tests.slurm.jobs import PYTHON

pytestmark = pytest.mark.slurm

ALL_REDUCE = """
import torch
import torch.distributed as dist
from megapsft.platform.launch import joined_world

world = joined_world()
dist.init_process_group("gloo")
total = torch.tensor(10.0 ** dist.get_rank())
dist.all_reduce(total)
print(f"rank {dist.get_rank()} of {world}: {total.item():.0f}")
dist.destroy_process_group()
"""


def test_tasks_run_on_the_nodes_that_are_named(jobs):
    job = jobs.submit("srun --label hostname", "--nodes=2", "--ntasks=2", "--nodelist=node1,node2")
    assert jobs.completes(job)["NodeList"] == "node[1-2]"
    assert sorted(jobs.log(job).read_text().split("\n")[:2]) == ["0: node1", "1: node2"]


def test_one_task_a_rank_joins_a_world_over_two_nodes(jobs):
    (jobs.folder / "reduce.py").write_text(ALL_REDUCE)
    script = f"export {PYTHON.split()[0]}; srun {PYTHON.split()[1]} {jobs.folder}/reduce.py"
    job = jobs.submit(script, "--nodes=2", "--ntasks-per-node=2", "--nodelist=node1,node2")
    jobs.completes(job)
    assert sorted(jobs.log(job).read_text().splitlines()) == [f"rank {rank} of 4: 1111" for rank in range(4)]


def test_a_node_that_crashed_starts_again(cluster, jobs):
    cluster.kill("node6")
    assert cluster.processes("node6") == []
    cluster.start("node6")
    job = jobs.submit("hostname", "--nodelist=node6")
    jobs.completes(job)
    assert jobs.log(job).read_text() == "node6\n"


def test_an_unplugged_node_is_reached_by_nobody_until_it_is_plugged(cluster):
    reach = ("timeout", "3", "bash", "-c", "exec 3<>/dev/tcp/node6/16818 && echo reached")
    assert cluster.on("node5", *reach) == "reached\n"
    cluster.unplug("node6")
    try:
        assert cluster.on("node5", *reach, check=False) == ""
    finally:
        cluster.plug("node6")
    assert cluster.on("node5", *reach) == "reached\n"


def test_what_a_node_mounts_others_do_not_see(cluster, tmp_path):
    (tmp_path / "file").write_text("shared")
    cluster.on("node6", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path))
    try:
        assert cluster.on("node6", "ls", str(tmp_path)) == ""
        assert cluster.on("node5", "ls", str(tmp_path)) == "file\n"
    finally:
        cluster.on("node6", "umount", str(tmp_path))
