"""The configs of the papers' runs are complete, and say on which machines they fit: each is planned, none is trained here."""

from __future__ import annotations

import pytest

from megapsft.cluster.estimate import estimate
from megapsft.cluster.hardware import GIB, GPUS, Machines
from megapsft.cluster.model_folder import shape_of_model
from megapsft.cluster.propose import propose
from megapsft.config import load_config
from megapsft.errors import Refused
from tests.shipped import FOLDER, OF_PAPERS

PAPERS = {
    "dapo/llama-3.1-8b-instruct", "dapo/qwen2.5-7b-instruct", "dft/qwen2.5-math-1.5b", "dft/qwen2.5-math-7b", "dpo/qwen3-4b-base",
    "psft/llama-3.1-8b-instruct", "psft/qwen2.5-7b-instruct", "psft/qwen3-30b-a3b", "psft/qwen3-4b-base",
    "sft/llama-3.1-8b-instruct", "sft/qwen2.5-7b-instruct", "sft/qwen3-4b-base", "srft/qwen2.5-math-7b",
}  # fmt: skip
HEADING = "# Nodes of 8 H100, as `megapsft plan` says:"


def taken(path) -> list[str]:
    """The comment of a config: what it takes on 1, 2, 4 and 8 nodes."""
    config, lines = load_config(path), [HEADING]
    hf = shape_of_model(path, config.model.path)
    for nodes in (1, 2, 4, 8):
        machines = Machines(gpu=GPUS["h100"], nodes=nodes, gpus_per_node=8)
        try:
            found = estimate(config, hf, machines)
        except Refused as error:
            lines.append(f"#   {nodes}: refused, {error.value} {error.rule}")
            continue
        memory = f"{found.peak / GIB:.0f} of {found.usable / GIB:.0f} GiB"
        if found.fits:
            lines.append(f"#   {nodes}: {memory}, {found.time.total:.1f} s a step, {found.tokens_per_second:,.0f} tokens/s")
            continue
        (other,) = propose(config, hf, machines, 1) or [None]
        instead = f"; {other.mesh.describe()} does, {other.time.total:.1f} s a step" if other else "; no other split does"
        lines.append(f"#   {nodes}: does not fit, {memory}{instead}")
    return lines


def test_all_runs_of_the_papers_are_there():
    assert {str(path.relative_to(FOLDER).with_suffix("")) for path in OF_PAPERS} == PAPERS


@pytest.mark.parametrize("path", OF_PAPERS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_config_says_what_it_takes(path):
    expected = "\n".join(taken(path))
    assert expected in path.read_text(), f"write into {path}:\n{expected}"
