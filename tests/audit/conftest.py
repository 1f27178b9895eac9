"""Rows as files, and what an audit says of them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megapsft.audit.across import Problem
from megapsft.audit.audit import Audit, audit
from megapsft.config import Config, load_config
from megapsft.data.arithmetic import generate, write_jsonl
from megapsft.data.chat_template import ChatTemplate
from megapsft.data.plan import Layout

VOCABULARY = 307  # of tiny_models
LAYOUT = Layout(packing=True, pack_length=2048, micro_batch_size=1)


@pytest.fixture(scope="session")
def template(tiny_models) -> ChatTemplate:
    return ChatTemplate.load(tiny_models("qwen3"))


@pytest.fixture
def config_of(tmp_path) -> Callable[..., Config]:
    """Writes the rows; `overrides` are key=value."""

    def make(rows: list[dict], *overrides: str) -> Config:
        path = Path(tmp_path) / "rows.jsonl"
        write_jsonl(path, rows)
        return load_config(None, [f"data.path={path}", "train.batch_size=16", "train.minibatch_size=8", *overrides])

    return make


@pytest.fixture
def look(template, config_of) -> Callable[..., Audit]:
    """An audit of rows."""

    def make(rows: list[dict], *overrides: str, evaluation: tuple[Problem, ...] = (), shown: int = 20) -> Audit:
        return audit(config_of(rows, *overrides), template, VOCABULARY, LAYOUT, evaluation=evaluation, rows=shown)

    return make


@pytest.fixture
def clean() -> list[dict]:
    """Demonstrations without a fault."""
    return [{"prompt": row["question"], "demonstration": row["answer"]} for row in generate(40, 1)]


def found(audit: Audit) -> dict[str, list[int]]:
    """rule -> rows."""
    return {warned.rule.name: list(warned.rows) for warned in audit.warnings}
