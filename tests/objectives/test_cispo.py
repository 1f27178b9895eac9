"""CISPO: the ratio as a clipped weight. More values: tests/oracles."""

import math

import pytest
import torch

from megapsft.objectives.cispo import CISPO
from tests.objectives.on_rollouts import LOGPROBS, OLD_LOGPROBS, close, evaluate

VARIANTS = [  # beside the defaults, for the contract
    {"clip_low": 0.2, "clip_high": 0.28},
    {"clip_high": None},
    {"kl_coef": 0.1, "tis": "token", "tis_cap": 1.1},
    {"tis": "sequence", "tis_batch_normalize": True, "advantage": "rloo", "norm_by_std": False},
    {"aggregation": "sum-over-B-Lmax", "max_response_length": 7, "singleton": "zero"},
]


def test_the_example_of_the_docstring():
    losses, gradient, _, loss = evaluate(CISPO(clip_high=0.28), LOGPROBS, OLD_LOGPROBS, 0.5)
    close(losses, [0.1162, 0.4977, 0.032])
    close(gradient, [-0.5809, -0.4524, -0.64])
    assert loss == pytest.approx(0.2153, abs=5e-5)


@pytest.mark.parametrize("advantage", [0.5, -0.5])
@pytest.mark.parametrize(
    ("options", "weights", "clipped"),
    [
        ({}, [5.0, 0.5], [1, 0]),
        ({"clip_low": 0.2}, [5.0, 0.8], [1, 1]),
        ({"clip_high": 0.28}, [1.28, 0.5], [1, 0]),
        ({"clip_high": None}, [6.0, 0.5], [0, 0]),
    ],
)
def test_no_token_loses_its_gradient_whatever_its_ratio_and_sign(advantage, options, weights, clipped):
    logprobs = [-0.1, -2.0]
    old_logprobs = [-0.1 - math.log(6), -2.0 - math.log(0.5)]
    _, gradient, metrics, _ = evaluate(CISPO(**options), logprobs, old_logprobs, advantage)
    close(gradient, [-advantage * weight for weight in weights])
    assert metrics["objective/clip_fraction"].tolist() == [clipped]


def test_log_ratios_beyond_twenty_keep_it_too():
    _, gradient, _, _ = evaluate(CISPO(clip_high=None), [-0.1], [-150.0], 1.0)
    torch.testing.assert_close(gradient, torch.tensor([[-math.exp(20)]]))
