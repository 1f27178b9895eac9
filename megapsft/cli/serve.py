"""megapsft serve: an SGLang server for runs that are elsewhere."""

from __future__ import annotations

from pathlib import Path

import tyro

from megapsft.cli.overrides import OVERRIDES


def serve(
    config: tyro.conf.Positional[Path],
    *,
    port: int = 30000,
    host: str = "127.0.0.1",
    ready: Path | None = None,
) -> int:
    """Start one SGLang server as a run would, and stay with it: megapsft serve CONFIG.yaml [key=value ...].

    For example:
        megapsft serve configs/grpo/tiny-qwen3-arithmetic.yaml --port 30000
        megapsft train configs/grpo/tiny-qwen3-arithmetic.yaml rollout.engine=sglang rollout.urls=[http://127.0.0.1:30000]

    Args:
        config: YAML file of the run; its model.path, model.dtype and rollout.* are read.
        port: that it listens on.
        host: name or address that it listens on. Whoever reaches it may sample and change its weights: others than loopback are
            for the network of a cluster alone.
        ready: file that is made once the server answers.
    """
    from megapsft.checkpoint.hf import read_config
    from megapsft.config import load_config
    from megapsft.models.families import check_served
    from megapsft.rollout.sglang.alone import stay_with
    from megapsft.rollout.sglang.server import Server, find_python
    from megapsft.train.engines import server_options

    resolved = load_config(config, OVERRIDES)
    check_served(read_config(resolved.model.path), "megapsft serve")
    options = server_options(resolved)
    server = Server(
        python=find_python(options.python), model=Path(resolved.model.path), dtype=resolved.model.dtype,
        tp_size=options.tensor_parallel_size, port=port, arguments=options.server_args, log=None, host=host,
    )  # fmt: skip
    return stay_with(server, startup_timeout=options.startup_timeout, ready=ready)
