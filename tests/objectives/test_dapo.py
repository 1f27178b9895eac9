"""DAPO: what differs from GRPO. Its reward shaping: tests/rewards; its sampling: tests/rollout; more values: tests/oracles."""

import pytest

from megapsft.objectives.dapo import DAPO
from megapsft.objectives.grpo import GRPO
from tests.objectives.on_rollouts import OLD_LOGPROBS, close, evaluate

VARIANTS = [  # beside the defaults, for the contract
    {"dual_clip": 10.0},
    {"clip_low": 0.0, "clip_high": 0.0},
    {"kl_coef": 0.01, "norm_by_std": False},
    {"tis": "sequence", "tis_cap": 1.2},
    {"tis": "token", "tis_batch_normalize": True},
]


def test_the_example_of_the_docstring():
    losses, gradient, _, loss = evaluate(DAPO(), [-0.2, -1.1, -0.9], OLD_LOGPROBS, -0.5)
    close(losses, [0.5809, 0.4524, 0.4])
    close(gradient, [0.5809, 0.4524, 0.0])
    assert loss == pytest.approx(0.4778, abs=5e-5)


def test_clips_higher_than_grpo():
    for objective, bound in ((DAPO(), 1.28), (GRPO(), 1.2)):
        losses, _, _, _ = evaluate(objective, [0.5], [0.0], 1.0)
        close(losses, [-bound])


def test_every_token_weighs_the_same_also_those_of_a_group_that_teaches_nothing():
    mask = [[True, True, True], [True, False, False]]
    numbers = ([[0.0] * 3, [0.0] * 3], 0.0, [[1.0] * 3, [0.0] * 3])
    assert evaluate(DAPO(), *numbers, mask=mask)[3] == pytest.approx(-3 / 4)
    assert evaluate(GRPO(), *numbers, mask=mask)[3] == pytest.approx(-1 / 2)
