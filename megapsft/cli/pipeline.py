"""megapsft pipeline: stages of training, one after the other."""

from __future__ import annotations

from pathlib import Path

import tyro

from megapsft.cli.overrides import OVERRIDES
from megapsft.errors import Refused


def pipeline(config: tyro.conf.Positional[Path], *, dry_run: bool = False) -> int:
    """Train stages one after the other, and compare their models: megapsft pipeline CONFIG.yaml [STAGE.key=value ...].

    For example:
        megapsft pipeline configs/pipelines/psft-grpo.yaml
        megapsft pipeline configs/pipelines/psft-grpo.yaml run.dir=runs/other grpo.train.steps=100
        megapsft pipeline configs/pipelines/psft-grpo.yaml --dry-run

    Interrupted or killed, it goes on from there when it is run again.

    Args:
        config: YAML file; `STAGE.key=value` overlays the config of a stage, `run.dir=`, `model=` and `compare.key=` the file.
        dry_run: check everything, print what would run, start nothing.
    """
    from megapsft.pipeline.config import load_pipeline
    from megapsft.pipeline.plan import plan_pipeline
    from megapsft.pipeline.run import run_pipeline
    from megapsft.pipeline.show import show_pipeline
    from megapsft.platform.launch import joined_world

    if joined_world() is not None:
        raise Refused("a pipeline as one of several ranks", "starts the ranks of its stages itself", "start it once, by itself")
    plan = plan_pipeline(load_pipeline(config, OVERRIDES))
    show_pipeline(plan)
    return 0 if dry_run else run_pipeline(plan)
