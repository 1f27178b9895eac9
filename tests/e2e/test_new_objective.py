"""Adding an objective takes one file: here a throw-away one, outside of the package and inside of it, trained like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import megapsft.objectives
from megapsft import cli
from megapsft.errors import Refused
from megapsft.objectives.registry import build_objective, objective_names
from tests.ranks import run_ranks

SOURCE = '''
from dataclasses import dataclass

import torch

from megapsft.objectives._per_token import PerToken
from megapsft.objectives._ratio import metrics_without_ratio


@dataclass(frozen=True, kw_only=True)
class Focal(PerToken):
    """loss_t = -(1 - p_t)^gamma l_t, the weight a constant: what is known already counts less."""

    gamma: float = 2.0

    def __call__(self, output, batch):
        logprobs = torch.where(batch.loss_mask, output.logprobs, 0)
        weight = (1 - logprobs.detach().exp()) ** self.gamma
        return -weight * logprobs, metrics_without_ratio(logprobs)
'''


@pytest.fixture
def focal(tmp_path) -> Path:
    path = tmp_path / "mine" / "focal.py"
    path.parent.mkdir()
    path.write_text(SOURCE)
    return path


def train(name, tmp_path, model, data):
    (tmp_path / "c.yaml").write_text("")
    options = [
        f"objective.name={name}", "objective.gamma=1.0", f"model.path={model}", f"data.path={data}",
        "data.columns.prompt=question", "data.columns.demonstration=answer", "model.dtype=float32", "train.batch_size=16",
        "train.steps=8", "optimizer.lr=3e-3", f"run.dir={tmp_path / 'run'}", "log.progress=false", "log.tensorboard=false",
    ]  # fmt: skip
    assert run_ranks(1, cli.main, ["train", str(tmp_path / "c.yaml"), *options]) == [0]
    return [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]


def test_a_file_of_ones_own_trains(focal, tmp_path, tiny_models, tiny_data):
    records = train(focal, tmp_path, tiny_models("qwen3"), tiny_data)
    assert len(records) == 8
    assert records[-1]["objective/nll"] < records[0]["objective/nll"] - 0.3
    assert records[0]["train/loss"] < records[0]["objective/nll"]  # the weight, below 1


def test_a_file_in_the_package_is_found_by_its_name(focal, tmp_path, tiny_models, tiny_data, monkeypatch):
    monkeypatch.setattr(megapsft.objectives, "__path__", [*megapsft.objectives.__path__, str(focal.parent)])
    assert "focal" in objective_names()
    records = train("focal", tmp_path, tiny_models("qwen3"), tiny_data)
    assert records[-1]["objective/nll"] < records[0]["objective/nll"] - 0.3


@pytest.mark.parametrize(
    ("text", "name", "rule"),
    [
        (None, "mine/none.py", "is not a file"),
        ("x = 1", "mine/focal.py", "defines 0 objectives"),
        (SOURCE + "\n\nclass Other(Focal):\n    pass\n", "mine/focal.py", "defines 2 objectives"),
    ],
)
def test_a_file_without_one_objective_is_refused(text, name, rule, focal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        focal.write_text(text)
    with pytest.raises(Refused, match=rule):
        build_objective({"name": name})


def test_options_of_a_file_of_ones_own_are_checked(focal):
    with pytest.raises(Refused, match="did you mean 'gamma'"):
        build_objective({"name": str(focal), "gama": 1.0})
