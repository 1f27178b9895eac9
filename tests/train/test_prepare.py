"""What a step gets before its updates. Values of estimators: tests/advantages; passes on splits: tests/invariants."""

from __future__ import annotations

import numpy as np
import pytest

from megapsft.objectives.registry import build_objective
from megapsft.train.prepare import with_advantages
from megapsft.types import Sample


def sample(reward: float, demonstration: bool = False) -> Sample:
    tokens = np.arange(4, dtype=np.int32)
    return Sample(token_ids=tokens, loss_mask=tokens > 1, source="rows:1", reward=reward, demonstration=demonstration)


def advantages(groups):
    return [[round(s.advantage, 4) for s in group] for group in groups]


GROUPS = [(sample(1.0), sample(0.0), sample(1.0, True)), (sample(0.0), sample(0.0), sample(1.0, True))]


def test_each_group_has_its_own_baseline():
    found = with_advantages([(sample(1.0), sample(0.0)), (sample(3.0), sample(1.0))], build_objective({"name": "grpo"}))
    assert advantages(found) == [[0.7071, -0.7071], [0.7071, -0.7071]]


def test_rollouts_alone_where_no_policy_of_ours_may_have_sampled_a_demonstration():
    found = with_advantages(GROUPS, build_objective({"name": "grpo"}))
    assert advantages(found) == [[0.7071, -0.7071], [0.0, 0.0]]


def test_the_demonstration_joins_the_group_of_a_mixture():
    found = with_advantages(GROUPS, build_objective({"name": "luffy"}))
    assert advantages(found) == [[0.3333, -0.6667, 0.3333], [-0.3333, -0.3333, 0.6667]]


def test_a_prompt_that_nobody_solved_is_learnt_from_its_demonstration():
    found = with_advantages(GROUPS, build_objective({"name": "hpt"}))
    assert [[s.demonstration for s in group] for group in found] == [[False, False], [True]]


def test_supervision_and_reinforcement_side_by_side():
    found = with_advantages(GROUPS, build_objective({"name": "hpt", "gate": None, "norm_by_std": True}))
    assert [[s.demonstration for s in group] for group in found] == [[False, False, True]] * 2
    assert advantages(found) == [[0.7071, -0.7071, 0.0], [0.0, 0.0, 0.0]]  # the demonstration is in no group


def test_without_advantages_nothing_is_touched():
    assert with_advantages(GROUPS, build_objective({"name": "sft"})) == GROUPS


@pytest.mark.parametrize(("singleton", "expected"), [("raw", 1.0), ("zero", 0.0)])
def test_groups_of_one(singleton, expected):
    found = with_advantages([(sample(1.0),)], build_objective({"name": "grpo", "singleton": singleton}))
    assert advantages(found) == [[pytest.approx(expected, abs=1e-4)]]


def test_leave_one_out():
    objective = build_objective({"name": "grpo", "advantage": "rloo", "norm_by_std": False})
    assert advantages(with_advantages([(sample(1.0), sample(0.0), sample(0.5))], objective)) == [[0.75, -0.75, 0.0]]
