"""Shared by all tests: a small data set and small random models, made once a session."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: threads of OpenMP do not survive the forks of tests/ranks.py

from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

from megapsft.checkpoint.random_init import WHOLE_HEADS, init_model  # noqa: E402
from megapsft.data.arithmetic import generate, write_jsonl  # noqa: E402

LONGEST = {"test_time_limit.py", "test_objectives.py", "test_docs.py", "test_kill.py", "test_sweep_report.py"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gsm8k", type=Path, help="JSONL with GSM8K's columns: train the shipped configs on its rows")


def pytest_configure() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so would all that tests start and interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at it
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With --dist loadgroup one worker has all tests with SGLang's servers, which they share; the others go by file.

    Files that take minutes come first, so that none of them is what the other workers wait for at the end.
    """
    items.sort(key=lambda item: item.path.name not in LONGEST)
    for item in items:
        together = "servers" if item.get_closest_marker("servers") else item.path.name
        item.add_marker(pytest.mark.xdist_group(together))


def pytest_collection_finish(session: pytest.Session) -> None:
    """A version of pytest that pytest-xdist does not know makes it forget the groups, and every worker starts servers."""
    loose = [item.nodeid for item in session.items if "@" not in item.nodeid]
    if session.config.getoption("loadgroup", False) and loose:
        raise pytest.UsageError(f"--dist loadgroup leaves {loose[0]} in no group: install what requirements/laptop.txt pins")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSONL of 64 generated problems, columns `question` and `answer`."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    write_jsonl(path, generate(64, 0))
    return path


@pytest.fixture(scope="session")
def tiny_models(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> folder of a random model of 4 layers, 4 heads, 2 key-value heads (and 8 experts). Never write into it."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = root / family
            init_model(
                family=family, data_path=tiny_data, out_dir=made[family], vocab_size=307, hidden_size=64,
                head_dim=16 if family in WHOLE_HEADS else 24, intermediate_size=128, seed=1,
            )  # fmt: skip
        return made[family]

    return make
