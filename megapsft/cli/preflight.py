"""megapsft preflight: the checks of a job's nodes before its ranks are started."""

from __future__ import annotations

import os
from pathlib import Path

import tyro


def preflight(
    folder: tyro.conf.Positional[Path],
    *,
    token: str = "",
    pair: str | None = None,
    judge: tuple[str, ...] = (),
    gpus: int | None = None,
    run_gib: float = 5.0,
    temp_gib: float = 1.0,
    megabytes: float = 8.0,
    seconds: float = 150.0,
) -> int:
    """Check the nodes of a job, one task a rank. Jobs of launchers/slurm do so by themselves.

    For example:
        echo here > checks/canary     (in an allocation of two nodes, in a folder that both see)
        srun --nodes 2 --ntasks-per-node 8 --label megapsft preflight checks --token here > checks/answers
        megapsft preflight checks --judge node1 node2

    Each finding is printed as a line of JSON. What all tasks have printed, in FOLDER/answers, `--judge` makes a verdict of: exit
    code 0 where all is good, 69 where nodes are bad (FOLDER/bad-nodes), 76 where something is wrong that no node is to blame for,
    79 where ranks do not reach one another and pairs of nodes are to be tried (FOLDER/pairs).

    Args:
        folder: on the file system of the run; `canary` in it says what the first node wrote.
        token: that it is to say.
        pair: two nodes, separated by a comma, whose tasks these are: only the all-reduce between them.
        judge: the nodes of the job, in order: make a verdict, once.
        gpus: that each node is to have; default: as many as Slurm gave the job.
        run_gib: that are to be free in the folder.
        temp_gib: that are to be free for temporary files of each node.
        megabytes: that the ranks sum up.
        seconds: after which that has failed.
    """
    from megapsft.cluster.preflight.examine import ALL_REDUCE, PAIR, examine_network, examine_node, tell
    from megapsft.cluster.preflight.judge import judge_folder
    from megapsft.cluster.preflight.show import show_verdict

    if judge:
        verdict = judge_folder(folder, judge)
        show_verdict(verdict, judge)
        return verdict.code
    gpus = int(os.environ.get("SLURM_GPUS_ON_NODE", "0")) if gpus is None else gpus
    good = True
    if pair is None and os.environ.get("SLURM_LOCALID", "0") == "0":
        for finding in examine_node(folder, token=token, gpus=gpus, run_gib=run_gib, temp_gib=temp_gib):
            tell(finding)
            good = good and finding.good
    check = ALL_REDUCE if pair is None else f"{PAIR} {pair}"
    return 0 if examine_network(check, gpus=gpus, megabytes=megabytes, seconds=seconds) and good else 1
