"""The learning rate, step by step."""

from __future__ import annotations

import math

import pytest

from megapsft.config import OptimizerConfig
from megapsft.parallel import shutdown
from megapsft.train.optimizer import learning_rate
from tests.ranks import run_ranks
from tests.train.test_update import make_run


def rates(steps: int, **options) -> list[float]:
    return [learning_rate(OptimizerConfig(lr=1.0, **options), step, steps) for step in range(steps)]


def test_constant():
    assert rates(3) == [1.0, 1.0, 1.0]


def test_warm_up_reaches_the_rate_and_never_starts_at_zero():
    assert rates(5, lr_warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_linear_ends_at_the_minimum():
    assert rates(5, lr_decay_style="linear", min_lr=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_after_warm_up():
    expected = [0.5, 1.0] + [(1 + math.cos(math.pi * k / 4)) / 2 for k in range(5)]
    assert rates(7, lr_decay_style="cosine", lr_warmup_steps=2) == pytest.approx(expected)


def test_one_step():
    assert rates(1, lr_decay_style="cosine") == [1.0]


def test_norms_and_biases_are_not_decayed(tiny_models, tiny_data):
    decays = run_ranks(1, _decays, tiny_models("qwen2"), tiny_data)[0]
    assert set(decays) == {(True, 0.1), (False, 0.0)}


def _decays(model, data):
    run = make_run(model, data, "optimizer.weight_decay=0.1")
    decays = [(p.dim() > 1, g["weight_decay"]) for g in run.optimizer.param_groups for p in g["params"]]
    shutdown()
    return decays
