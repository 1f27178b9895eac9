"""megapsft submit: a run as a job of Slurm."""

from __future__ import annotations

import sys
from pathlib import Path

import tyro

from megapsft.cli.overrides import OVERRIDES


def submit(
    config: tyro.conf.Positional[Path],
    *,
    cluster: Path | None = None,
    nodes: int = 1,
    rollout_nodes: int = 0,
    after: tuple[str, ...] = (),
    option: tuple[str, ...] = (),
    dry_run: bool = False,
) -> int:
    """Train as a job of Slurm: megapsft submit CONFIG.yaml --nodes N --cluster CLUSTER.yaml [key=value ...].

    For example:
        megapsft submit configs/psft/qwen3-30b-a3b.yaml --nodes 4 --cluster configs/cluster/my.yaml
        megapsft submit configs/psft/qwen3-30b-a3b.yaml --nodes 4 --cluster my.yaml --dry-run > job.sbatch
        megapsft submit CONFIG.yaml --nodes 2 --rollout-nodes 1 --cluster my.yaml cluster.time=08:00:00 train.steps=200

    Checked before it is queued; what is submitted is the config as it is now, kept under RUN/slurm. Before its time is over the
    run saves itself and goes back into the queue (docs/cluster.md). Then: megapsft status RUN, logs RUN, cancel RUN.

    Args:
        config: YAML file; `key=value` arguments overlay it, `megapsft config` lists the keys.
        cluster: YAML file, see configs/cluster/example.yaml; `cluster.key=value` arguments overlay it.
        nodes: of the trainers.
        rollout_nodes: more nodes, for SGLang servers alone; default: they are beside the trainers.
        after: jobs that have to succeed before.
        option: more options of sbatch, such as --option=--nodelist=node7.
        dry_run: check everything, print the script, submit nothing.
    """
    from megapsft.cluster.slurm.config import load_cluster
    from megapsft.cluster.slurm.script import lint
    from megapsft.cluster.slurm.submit import prepare
    from megapsft.cluster.slurm.submit import submit as send
    from megapsft.config import load_config

    of_cluster = [text.removeprefix("cluster.") for text in OVERRIDES if text.startswith("cluster.")]
    of_run = [text for text in OVERRIDES if not text.startswith("cluster.")]
    described = load_cluster(cluster, of_cluster)
    prepared = prepare(
        config, load_config(config, of_run), described, nodes=nodes, rollout_nodes=rollout_nodes, after=after, options=option
    )  # fmt: skip
    for note in prepared.notes:
        print(f"megapsft: note: {note}", file=sys.stderr)
    if dry_run:
        script = prepared.script.render()
        checked = lint(script)
        print(script, end="")
        print(f"megapsft: found right by {' and '.join(checked)}; nothing was submitted", file=sys.stderr)
        return 0
    number = send(prepared)
    print(f"job {number}: megapsft status {prepared.config.run.dir}")
    return 0
