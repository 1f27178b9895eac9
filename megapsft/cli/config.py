"""megapsft config: every key with its value."""

from __future__ import annotations

import json
from pathlib import Path

import tyro

from megapsft.cli.overrides import OVERRIDES
from megapsft.errors import Refused


def config(config: tyro.conf.Positional[Path | None] = None, *, key: tuple[str, ...] = ()) -> int:
    """Print the resolved config: every key with its value.

    For example:
        megapsft config
        megapsft config configs/psft/tiny-qwen3-gsm8k.yaml train.steps=50
        megapsft config configs/psft/tiny-qwen3-gsm8k.yaml --key run.dir

    Args:
        config: YAML file; defaults where there is none.
        key: only the values of these, one a line.
    """
    from megapsft.config import flatten, load_config

    resolved = load_config(config, OVERRIDES)
    if not key:
        from megapsft.train.plan import to_yaml

        print(to_yaml(resolved), end="")
        return 0
    values = flatten(resolved)
    for name in key:
        if name not in values:
            raise Refused(f"--key {name}", "is not a config key", "see `megapsft config`")
        value = values[name]
        print(value if isinstance(value, str) else json.dumps(value))
    return 0
