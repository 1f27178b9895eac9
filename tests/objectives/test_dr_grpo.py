"""Dr. GRPO: what differs from GRPO. More values: tests/oracles."""

import pytest

from megapsft.errors import Refused
from megapsft.objectives.dr_grpo import DrGRPO
from megapsft.objectives.registry import build_objective
from tests.objectives.on_rollouts import LOGPROBS, OLD_LOGPROBS, close, evaluate

REQUIRED = {"max_response_length": 8}
VARIANTS = [  # beside the defaults, for the contract
    {"aggregation": "sum-over-Lmax"},
    {"advantage": "rloo"},
    {"norm_by_std": True, "dual_clip": 3.0},
    {"kl_coef": 0.1, "tis": "token", "tis_batch_normalize": True},
]


def test_the_example_of_the_docstring():
    losses, gradient, _, loss = evaluate(DrGRPO(max_response_length=8), LOGPROBS, OLD_LOGPROBS, 0.5)
    close(losses, [-0.5809, -0.4524, -0.6])
    close(gradient, [-0.5809, -0.4524, 0.0])
    assert loss == pytest.approx(-0.2042, abs=5e-5)


def test_divides_by_samples_and_length_limit_empty_samples_included():
    mask = [[True, True], [False, False]]
    arguments = ([[0.0, 0.0], [0.0, 0.0]], 0.0, 1.0, mask)
    assert evaluate(DrGRPO(max_response_length=8), *arguments)[3] == pytest.approx(-2 / 16)
    objective = DrGRPO(max_response_length=8, aggregation="sum-over-Lmax")
    assert evaluate(objective, *arguments)[3] == pytest.approx(-2 / 8)


def test_no_standard_deviation_unless_asked_for():
    assert not DrGRPO(max_response_length=8).advantages.norm_by_std
    assert DrGRPO(max_response_length=8, norm_by_std=True).advantages.norm_by_std


def test_the_length_limit_has_no_default():
    with pytest.raises(Refused, match="divides by it"):
        build_objective({"name": "dr_grpo"})
