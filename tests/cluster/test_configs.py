"""The configs of the papers' runs are complete, and say on which machines they fit: each is planned, none is trained here."""

from __future__ import annotations

import pytest

from tests.cluster.comments import HEADING, commented
from tests.shipped import FOLDER, OF_PAPERS

PAPERS = {
    "dapo/llama-3.1-8b-instruct", "dapo/qwen2.5-7b-instruct", "dft/qwen2.5-math-1.5b", "dft/qwen2.5-math-7b", "dpo/qwen3-4b-base",
    "psft/llama-3.1-8b-instruct", "psft/qwen2.5-7b-instruct", "psft/qwen3-30b-a3b", "psft/qwen3-30b-a3b-lora",
    "psft/qwen2.5-vl-7b", "psft/qwen3-4b-base",
    "sft/llama-3.1-8b-instruct", "sft/qwen2.5-7b-instruct", "sft/qwen3-4b-base", "srft/qwen2.5-math-7b",
}  # fmt: skip


def test_all_runs_of_the_papers_are_there():
    assert {str(path.relative_to(FOLDER).with_suffix("")) for path in OF_PAPERS} == PAPERS


@pytest.mark.parametrize("path", OF_PAPERS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_config_says_what_it_takes(path):
    assert HEADING in path.read_text()
    assert path.read_text() == commented(path), "run python -m tests.cluster.comments"


@pytest.mark.parametrize("path", OF_PAPERS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_config_fits_on_two_nodes_or_more(path):
    for nodes in (2, 4, 8):
        (line,) = [line for line in path.read_text().splitlines() if line.startswith(f"#   {nodes}: ")]
        assert "tokens/s" in line, line
