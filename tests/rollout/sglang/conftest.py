"""Two servers of one tiny model, started once and never ended by a test: what a test does to them, it does through a proxy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megapsft.checkpoint.random_init import init_model
from tests.rollout.sglang.servers import await_health, start


def tiny(family: str, data: Path, out: Path) -> Path:
    sizes = {"vocab_size": 307, "hidden_size": 64, "num_layers": 2, "intermediate_size": 128, "seed": 1}
    return init_model(family=family, data_path=data, out_dir=out, **sizes)


@pytest.fixture(scope="session")
def dense(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("qwen3", tiny_data, tmp_path_factory.mktemp("sglang") / "dense")


@pytest.fixture(scope="session")
def moe(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("qwen3_moe", tiny_data, tmp_path_factory.mktemp("sglang") / "moe")


@pytest.fixture(scope="package")
def two_urls(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    servers = []
    try:
        for number in range(2):
            servers.append(start(dense, tmp_path_factory.mktemp("servers") / f"{number}.log"))
        for server in servers:
            await_health(server)
        yield [server.url for server in servers]
    finally:
        for server in servers:
            server.kill()
