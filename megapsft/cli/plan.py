"""megapsft plan: what a run takes of a cluster."""

from __future__ import annotations

from pathlib import Path

import tyro

from megapsft.cli.overrides import OVERRIDES
from megapsft.errors import Refused


def plan(
    config: tyro.conf.Positional[Path],
    *,
    nodes: int = 1,
    gpus_per_node: int = 8,
    gpu: str = "h100",
    model: Path | None = None,
    proposals: int = 5,
    json: Path | None = None,
) -> int:
    """Say what a run takes of a cluster: megapsft plan CONFIG.yaml [key=value ...]. No GPU, no data and no weights are needed.

    For example:
        megapsft plan configs/psft/qwen3-30b-a3b.yaml --nodes 4 --gpus-per-node 8 --gpu h100
        megapsft plan configs/psft/qwen3-30b-a3b.yaml --nodes 2 parallel.pipeline_model_parallel_size=4 --json plan.json
        megapsft plan CONFIG.yaml --model models/Qwen3-8B --gpu h200

    Memory by rank and pipeline stage, time of a step, traffic, and splits that fit, ranked. Exit code 2 where it does not fit.

    Args:
        config: YAML file; `key=value` arguments overlay it, `megapsft config` lists the keys.
        nodes: machines.
        gpus_per_node: GPUs of each.
        gpu: a100, h100, h200 or b200.
        model: a folder with config.json; default: model.path, or the shape of that name in configs/models.
        proposals: splits to propose; 0: none.
        json: file to write it all to.
    """
    from megapsft.cluster.estimate import estimate
    from megapsft.cluster.hardware import Machines, gpu_named
    from megapsft.cluster.model_folder import shape_of_model
    from megapsft.cluster.propose import propose
    from megapsft.cluster.show import show_estimate, show_proposals, write_estimate
    from megapsft.config import load_config
    from megapsft.output.places import check_file

    check_file("--json", json)
    resolved = load_config(config, OVERRIDES)
    machines = Machines(gpu=gpu_named(gpu), nodes=nodes, gpus_per_node=gpus_per_node)
    hf = shape_of_model(config, resolved.model.path, model)
    if proposals < 0:
        raise Refused(f"--proposals {proposals}", "must be 0 or more", "leave it out for 5")
    others = propose(resolved, hf, machines, proposals) if proposals else None
    try:
        found = estimate(resolved, hf, machines)
    except Refused:
        if others:
            show_proposals(others)
        raise
    show_estimate(found, others)
    if json is not None:
        write_estimate(found, others, json)
        print(f"wrote {json}")
    return 0 if found.fits else 2
