"""The sections of tokens and of compared models, from files that are made up."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megapsft.errors import Refused
from megapsft.report.compare import write_json
from megapsft.report.folders import Shown
from megapsft.report.html import figure
from megapsft.report.run import Run
from megapsft.report.sections import comparisons, tokens
from megapsft.train.comparison import Comparison, Seen


def counts(epoch: int, clipped: int) -> str:
    line = {"epoch": epoch, "ids": [5, 7], "tokens": [" the", "wait"], "trained": [100, 10], "clipped": [0, clipped]}
    return json.dumps(line) + "\n"


@pytest.fixture
def run(tmp_path) -> Run:
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens/counts.jsonl").write_text(counts(1, 4) + counts(2, 0) + counts(3, 2))
    (tmp_path / "tokens/step-000002-update-000003.jsonl").write_text(json.dumps({"logprobs": [-0.1, -2.0]}) + "\n")
    return Run(name="psft", folder=tmp_path)


def test_tokens(run, tmp_path):
    found = tokens.section(Shown(runs=[run, Run(name="sft", folder=tmp_path / "empty"), Run(name="no folder")]))
    assert [one.title for one in found.figures] == [
        "psft: clipped tokens, epoch 1",
        "psft: clipped tokens, epoch 3",  # in the second nothing was
        "psft: how often a token is clipped when it is trained",
        "psft: probabilities of trained tokens",
    ]
    assert "40.0%" in figure(found.figures[2])
    assert [series.name for series in found.figures[3].series] == ["step 2"]
    assert len({one.name for one in found.figures}) == 4


def test_a_run_without_a_clip_has_no_cloud(tmp_path):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens/counts.jsonl").write_text(counts(1, 0))
    assert tokens.section(Shown(runs=[Run(name="sft", folder=tmp_path)])) is None
    assert tokens.section(Shown()) is None


def test_comparisons(run, tmp_path):
    assert comparisons.section(Shown(runs=[run])) is None
    logs = {"base": np.log([0.5, 0.5]), "psft": np.log([0.5, 0.75])}
    base, tuned = (
        Seen(name=name, path=name, logprobs=p, entropy=p, ranks=np.ones(2, int), kl=p, kl_of_base=p) for name, p in logs.items()
    )
    made = Comparison(
        data="x", sources=("x:1",), lengths=(2,), token_ids=np.array([1, 2]), words={1: "a", 2: "b"}, base=base, tuned=(tuned,)
    )
    write_json(made, tmp_path / "compare.json")
    found = comparisons.section(Shown(runs=[run, run]))
    assert len({one.name for one in found.figures}) == len(found.figures) == 10
    assert found.figures[0].title == "psft: Models"
    (tmp_path / "compare.json").write_text("{}")
    with pytest.raises(Refused, match=r"compare\.json: is not what"):
        comparisons.section(Shown(runs=[run]))
