"""megapsft submit: a run, or the stages of a pipeline, as jobs of Slurm."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from megapsft.cli.overrides import OVERRIDES

if TYPE_CHECKING:
    from megapsft.cluster.slurm.script import Script


def submit(
    config: tyro.conf.Positional[Path],
    *,
    cluster: Path | None = None,
    nodes: int = 1,
    rollout_nodes: int = 0,
    after: tuple[str, ...] = (),
    option: tuple[str, ...] = (),
    via: Literal["sbatch", "nemo-run"] = "sbatch",
    dry_run: bool = False,
) -> int:
    """Train as a job of Slurm: megapsft submit CONFIG.yaml --nodes N --cluster CLUSTER.yaml [key=value ...].

    For example:
        megapsft submit configs/psft/qwen3-30b-a3b.yaml --nodes 4 --cluster configs/cluster/my.yaml
        megapsft submit configs/psft/qwen3-30b-a3b.yaml --nodes 4 --cluster my.yaml --dry-run > job.sbatch
        megapsft submit CONFIG.yaml --nodes 2 --rollout-nodes 1 --cluster my.yaml cluster.time=08:00:00 train.steps=200
        megapsft submit configs/pipelines/psft-grpo.yaml --cluster my.yaml     (a job for each stage, after the one before)

    Checked before it is queued; what is submitted is the config as it is now, kept under RUN/slurm. Before its time is over the
    run saves itself and goes back into the queue (docs/cluster.md). Then: megapsft status RUN, logs RUN, cancel RUN.

    Args:
        config: YAML file; `key=value` arguments overlay it, as they do for `megapsft train` or `megapsft pipeline`.
        cluster: YAML file, see configs/cluster/example.yaml; `cluster.key=value` arguments overlay it.
        nodes: of the trainers.
        rollout_nodes: more nodes, for SGLang servers alone; default: they are beside the trainers.
        after: jobs that have to succeed before.
        option: more options of sbatch, such as --option=--nodelist=node7.
        via: who writes the script: this, or nemo-run's Slurm executor, which `make nemo-run` installs.
        dry_run: check everything, print the script, submit nothing.
    """
    from megapsft.cluster.slurm.config import load_cluster
    from megapsft.cluster.slurm.submit import prepare
    from megapsft.cluster.slurm.submit import submit as send
    from megapsft.config import load_config, read_yaml
    from megapsft.pipeline.chain import COMPARE, prepare_chain, submit_chain
    from megapsft.pipeline.config import load_pipeline

    described = load_cluster(cluster, [text.removeprefix("cluster.") for text in OVERRIDES if text.startswith("cluster.")])
    of_run = [text for text in OVERRIDES if not text.startswith("cluster.")]
    asked = {"nodes": nodes, "rollout_nodes": rollout_nodes, "after": after, "options": option}
    if "stages" in read_yaml(config):
        chain = prepare_chain(load_pipeline(config, of_run), described, **asked)
        _say(chain.notes)
        if dry_run:
            return _show(chain.scripts, {COMPARE: "sbatch"}, via)
        for name, number in submit_chain(chain, via).items():
            print(f"job {number}: {name}")
        print(f"megapsft status {chain.pipeline.run.dir}")
        return 0
    prepared = prepare(config, load_config(config, of_run), described, **asked)
    _say(prepared.notes)
    if dry_run:
        return _show({"": prepared.script}, {}, via)
    print(f"job {send(prepared, via)}: megapsft status {prepared.config.run.dir}")
    return 0


def _say(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"megapsft: note: {note}", file=sys.stderr)


def _show(scripts: Mapping[str, Script], always: Mapping[str, str], via: str) -> int:
    """Print what would be submitted, one script after the other."""
    from megapsft.cluster.slurm.nemo import through_nemo_run
    from megapsft.cluster.slurm.script import lint

    for name, script in scripts.items():
        text = script.render()
        checked = lint(text)
        if always.get(name, via) == "nemo-run":
            text = through_nemo_run(script, dry_run=True).script
        print(text.rstrip())
        about = f"{name}: " if name else ""
        print(f"megapsft: {about}found right by {' and '.join(checked)}; nothing was submitted", file=sys.stderr)
    return 0
