"""GRPO, and what it shares with every objective on rollouts: the KL, advantages, rewards, refusals. TIS: test_tis.py.

Garbage, splits and precision: test_contract.py; more values: tests/oracles.
"""

import math

import pytest
import torch

from megapsft.errors import Refused
from megapsft.metrics.reduce import Reduction
from megapsft.objectives.grpo import GRPO
from megapsft.objectives.registry import build_objective
from megapsft.types import AdvantageOptions, PolicyOutput
from tests.objectives.on_rollouts import LOGPROBS, OLD_LOGPROBS, close, evaluate
from tests.oracles.batches import update_batch

VARIANTS = [  # beside the defaults, for the contract
    {"clip_low": None, "clip_high": None},
    {"clip_low": 0.1, "clip_high": 0.5, "dual_clip": 1.2},
    {"kl_coef": 0.04},
    {"advantage": "rloo", "norm_by_std": False, "singleton": "zero"},
    {"tis": "token", "tis_cap": 1.1},
    {"tis": "sequence", "tis_batch_normalize": True},
    {"tis": "token", "tis_cap": 1.5, "kl_coef": 0.1, "dual_clip": 3.0},
    {"aggregation": "sum-over-Lmax", "max_response_length": 7},
]


def test_the_example_of_the_docstring():
    losses, gradient, _, loss = evaluate(GRPO(), LOGPROBS, OLD_LOGPROBS, 0.5)
    close(losses, [-0.5809, -0.4524, -0.6])
    close(gradient, [-0.5809, -0.4524, 0.0])
    assert loss == pytest.approx(-0.5444, abs=5e-5)


def test_where_the_clip_binds_depends_on_the_sign_of_the_advantage():
    up, down = [0.4, 0.4], [-0.4, -0.4]  # log-ratios: beyond 1.2 and below 0.8
    losses, gradient, metrics, _ = evaluate(GRPO(), [up, down], 0.0, [[1.0, -1.0], [1.0, -1.0]])
    close(losses, [[-1.2, math.exp(0.4)], [-math.exp(-0.4), 0.8]])
    close(gradient, [[0.0, math.exp(0.4)], [-math.exp(-0.4), 0.0]])
    assert metrics["objective/clip_fraction"].tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"clip_low": 0.5}, [[-1.2], [math.exp(-0.4)]]),
        ({"clip_low": None}, [[-1.2], [math.exp(-0.4)]]),
        ({"clip_high": 0.6}, [[-math.exp(0.4)], [0.8]]),
        ({"clip_high": None}, [[-math.exp(0.4)], [0.8]]),
    ],
)
def test_each_bound_is_an_option(options, expected):
    losses, _, _, _ = evaluate(GRPO(**options), [[0.4], [-0.4]], 0.0, [[1.0], [-1.0]])
    close(losses, expected)


def test_the_dual_clip_caps_tokens_with_a_negative_advantage():
    ratios = [math.log(2.9), math.log(3.1), math.log(3.1)]
    advantages = [-0.5, -0.5, 0.5]
    losses, gradient, metrics, _ = evaluate(GRPO(dual_clip=3.0), ratios, 0.0, advantages)
    close(losses, [1.45, 1.5, -0.6])
    close(gradient, [1.45, 0.0, 0.0])
    assert metrics["objective/clip_fraction_lower"].tolist() == [[0, 1, 0]]
    losses, gradient, metrics, _ = evaluate(GRPO(), ratios, 0.0, advantages)
    close(losses, [1.45, 1.55, -0.6])
    assert "objective/clip_fraction_lower" not in metrics


def test_an_advantage_of_zero_trains_nothing_but_the_kl():
    losses, gradient, metrics, _ = evaluate(GRPO(), LOGPROBS, OLD_LOGPROBS, 0.0)
    assert not losses.any()
    assert not gradient.any()
    assert not metrics["objective/clip_fraction"].any()
    _, gradient, metrics, _ = evaluate(GRPO(kl_coef=0.1), LOGPROBS, OLD_LOGPROBS, 0.0, ref_logprobs=[-0.5, -0.9, -0.05])
    close(gradient, [0.1 * (1 - math.exp(-0.3)), 0.1 * (1 - math.exp(0.2)), 0.0])
    close(metrics["objective/kl"], [math.exp(-0.3) + 0.3 - 1, math.exp(0.2) - 0.2 - 1, 0.0])


def test_asks_for_a_reference_where_there_is_a_kl():
    assert GRPO().needs == {"old_logprobs"}
    assert "objective/kl" not in GRPO().metrics
    assert GRPO(kl_coef=0.04).needs == {"old_logprobs", "ref_logprobs"}


def test_log_ratios_beyond_twenty_have_no_gradient():
    losses, gradient, _, _ = evaluate(GRPO(clip_high=None, clip_low=None), [-1.0, -90.0], [-60.0, -1.0], [-1.0, 1.0])
    torch.testing.assert_close(losses, torch.tensor([[math.exp(20), -math.exp(-20)]]))
    assert gradient.tolist() == [[0, 0]]


def test_rewards_are_a_mean_over_samples_and_advantages_over_tokens():
    mask = torch.tensor([[True] * 4, [True, False, False, False], [False] * 4])
    column = torch.tensor([[1.0], [0.0], [7.0]])
    fields = {"rewards": column.expand(3, 4), "advantages": (column - 0.5).expand(3, 4), "old_logprobs": torch.zeros(3, 4)}
    batch = update_batch(GRPO(), mask, torch.float32, **fields)
    _, metrics = GRPO()(PolicyOutput(logprobs=torch.zeros(3, 4), entropy=torch.zeros(3, 4)), batch)
    reduction = Reduction(GRPO().metrics)
    reduction.add(metrics, mask)
    reduced = reduction.finish()
    assert [reduced[f"reward/{over}"] for over in ("mean", "max", "min")] == [0.5, 1, 0]
    assert [reduced[f"advantages/{over}"] for over in ("mean", "max", "min")] == [pytest.approx(0.3), 0.5, -0.5]


def test_says_how_rewards_become_advantages():
    assert GRPO().advantages == AdvantageOptions(estimator="group", norm_by_std=True, singleton="raw")
    rloo = GRPO(advantage="rloo", norm_by_std=False, singleton="zero")
    assert rloo.advantages == AdvantageOptions(estimator="rloo", norm_by_std=False, singleton="zero")


def test_demonstrations_are_no_rollouts():
    assert GRPO.trains_on == {"rollouts"}
    assert GRPO().keep([1.0, 0.0, 1.0], [False, False, True]) == [True, True, False]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clip_low": -0.1}, "clip_low=-0.1: must lie in 0..1"),
        ({"clip_low": 1.1}, "clip_low=1.1"),
        ({"clip_high": -0.1}, "clip_high=-0.1: must be 0 or more"),
        ({"kl_coef": -0.1}, "kl_coef=-0.1"),
        ({"dual_clip": 1.0}, "dual_clip=1.0: must be above 1"),
        ({"advantage": "rloo"}, "set norm_by_std=false"),
        ({"advantage": "gae"}, "group"),
        ({"singleton": "one"}, "raw"),
        ({"tis": "tokens"}, "sequence"),
        ({"tis": "token", "tis_cap": 0.0}, "tis_cap=0.0: must be above 0"),
        ({"tis_cap": 3.0}, "tis_cap=3.0: has nothing to act on with tis=off"),
        ({"tis_batch_normalize": True}, "tis_batch_normalize=True: has nothing to act on with tis=off"),
        ({"clip_high": math.nan}, "finite"),
    ],
)
def test_refuses_and_says_what_would_be_right(options, said):
    with pytest.raises(Refused) as refused:
        build_objective({"name": "grpo"} | options)
    assert said in str(refused.value)
