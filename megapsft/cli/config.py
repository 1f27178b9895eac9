"""megapsft config: every key with its value."""

from __future__ import annotations

from pathlib import Path

import tyro

from megapsft.cli.overrides import OVERRIDES


def config(config: tyro.conf.Positional[Path | None] = None) -> int:
    """Print the resolved config: every key with its value.

    For example:
        megapsft config
        megapsft config configs/psft/tiny-qwen3-gsm8k.yaml train.steps=50

    Args:
        config: YAML file; defaults where there is none.
    """
    from megapsft.config import load_config
    from megapsft.train.plan import to_yaml

    print(to_yaml(load_config(config, OVERRIDES)), end="")
    return 0
