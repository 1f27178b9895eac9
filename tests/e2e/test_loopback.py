"""A run on one machine listens on its loopback interface alone, with one rank and with several."""

from __future__ import annotations

import time

import psutil
import pytest

from tests.command import megapsft_started
from tests.shipped import FOLDER


@pytest.mark.parametrize("split", [(), ("parallel.tensor_model_parallel_size=2",)], ids=["1 rank", "tp2"])
def test_no_port_is_open_to_the_network(split, tiny_models, tiny_data, tmp_path):
    options = [
        f"model.path={tiny_models('qwen3')}", f"data.path={tiny_data}", f"run.dir={tmp_path / 'run'}", "train.steps=4",
        "train.batch_size=16", "train.sft_warmup_steps=0", "log.tensorboard=false", "log.progress=false", *split,
    ]  # fmt: skip
    found = set()
    with megapsft_started("train", str(FOLDER / "psft/tiny-qwen3-gsm8k.yaml"), *options, log=tmp_path / "log") as run:
        deadline = time.monotonic() + 240
        while run.poll() is None:
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            found |= listening(run.pid)
            time.sleep(0.05)
        assert run.returncode == 0, (tmp_path / "log").read_text()
    assert found == {"127.0.0.1"}


def listening(launcher: int) -> set[str]:
    """The addresses on which it and all that it started listen."""
    found = set()
    try:
        processes = [psutil.Process(launcher), *psutil.Process(launcher).children(recursive=True)]
    except psutil.NoSuchProcess:
        return found
    for process in processes:
        try:
            connections = process.net_connections("tcp")
        except psutil.Error:  # it ended in between
            continue
        found |= {one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN}
    return found
