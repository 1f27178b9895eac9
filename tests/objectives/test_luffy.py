"""LUFFY. Garbage, splits and precision: test_contract.py; more values: tests/oracles."""

import math

import pytest
import torch

from megapsft.errors import Refused
from megapsft.objectives.luffy import LUFFY
from megapsft.objectives.registry import build_objective
from megapsft.types import AdvantageOptions, PolicyOutput
from tests.oracles.batches import microbatch

VARIANTS = [  # beside the defaults, for the contract
    {"gamma": None},
    {"on_policy_clip": 0.2},
    {"entropy_coef": 0.0},
    {"norm_by_std": True},
    {"aggregation": "token-mean"},
]


def evaluate(objective, logprobs, old_logprobs, advantages, demonstration, entropy=None):
    """(losses, gradient of their sum, metrics); everything [S], all of it trained."""
    logprobs = torch.tensor([logprobs], requires_grad=True)
    mask = torch.ones(logprobs.shape, dtype=torch.bool)
    batch = microbatch(
        mask, mask / 8192, old_logprobs=torch.tensor([old_logprobs]), advantages=torch.tensor([advantages]),
        demonstration=torch.tensor([demonstration]),
    )  # fmt: skip
    entropy = torch.zeros(logprobs.shape) if entropy is None else torch.tensor([entropy])
    losses, metrics = objective(PolicyOutput(logprobs=logprobs, entropy=entropy), batch)
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    return losses.detach()[0], gradient[0], metrics


@pytest.mark.parametrize("any_old", [0.0, -9.0, math.nan])
def test_the_example_of_the_docstring(any_old):
    arguments = [-0.2, -2.3, -0.6], [any_old, any_old, -0.9], [0.5, 0.5, -0.5], [True, True, False]
    losses, gradient, metrics = evaluate(LUFFY(entropy_coef=0.0), *arguments)
    torch.testing.assert_close(losses, torch.tensor([-0.4456, -0.2503, 0.6749]), atol=5e-5, rtol=0)
    torch.testing.assert_close(gradient, torch.tensor([-0.0485, -0.1250, 0.6749]), atol=5e-5, rtol=0)
    assert metrics["objective/ratio_mean"].values[0].tolist() == pytest.approx([1, 1, math.exp(0.3)])


def test_without_shaping_a_demonstration_pulls_by_its_probability():
    losses, gradient, _ = evaluate(LUFFY(gamma=None), [-0.2, -2.3], [0.0, 0.0], [0.5, 0.5], [True, True])
    torch.testing.assert_close(losses, torch.tensor([-0.5 * math.exp(-0.2), -0.5 * math.exp(-2.3)]))
    assert torch.equal(gradient, losses)


def test_the_slope_of_the_shaping_is_steepest_at_gamma():
    logprobs = [math.log(p) for p in (0.02, 0.05, 0.1, 0.2, 0.5)]
    _, gradient, _ = evaluate(LUFFY(), logprobs, [0.0] * 5, [1.0] * 5, [True] * 5)
    assert gradient.argmin() == 2
    assert gradient[2].item() == pytest.approx(-0.25)


def test_rollouts_are_clipped_on_both_sides_where_asked():
    arguments = [-0.5, -0.5, -0.5, -0.5], [-1.0, -0.1, -1.0, -0.1], [1.0, 1.0, -1.0, -1.0], [False] * 4
    rise, fall = math.exp(0.5), math.exp(-0.4)
    losses, gradient, metrics = evaluate(LUFFY(on_policy_clip=0.2), *arguments)
    torch.testing.assert_close(losses, torch.tensor([-1.2, -fall, rise, 0.8]))
    torch.testing.assert_close(gradient, torch.tensor([0.0, -fall, rise, 0.0]))
    assert metrics["luffy/on_clip_fraction"].values[0].tolist() == [1, 0, 0, 1]
    losses, gradient, metrics = evaluate(LUFFY(), *arguments)
    torch.testing.assert_close(losses, torch.tensor([-rise, -fall, rise, fall]))
    assert torch.equal(gradient, losses)
    assert not metrics["luffy/on_clip_fraction"].values.any()


def test_a_demonstration_is_never_clipped():
    _, gradient, metrics = evaluate(LUFFY(on_policy_clip=0.2), [-0.1], [-5.0], [1.0], [True])
    assert gradient.item() < 0
    assert not metrics["objective/clip_fraction"].values.any()


def test_the_bonus_is_on_every_token():
    arguments = [-0.5, -0.5], [-0.5, -0.5], [0.0, 0.0], [True, False], [0.3, 2.0]
    losses, _, _ = evaluate(LUFFY(entropy_coef=0.1), *arguments)
    torch.testing.assert_close(losses, torch.tensor([-0.03, -0.2]))
    losses, _, _ = evaluate(LUFFY(entropy_coef=0.0), *arguments)
    assert not losses.any()


def test_defaults_are_those_of_the_script():
    objective = LUFFY()
    assert (objective.aggregation, objective.max_response_length, objective.entropy_coef) == ("sum-over-Lmax", 8192, 0.001)
    assert LUFFY(max_response_length=100).max_response_length == 100
    assert LUFFY(aggregation="token-mean").max_response_length is None
    assert objective.advantages == AdvantageOptions(estimator="group", norm_by_std=False)
    assert LUFFY(norm_by_std=True).advantages.norm_by_std
    assert (objective.needs, objective.trains_on, objective.totals_need) == ({"old_logprobs"}, {"rollouts"}, None)
    assert (objective.entropy_gradient, LUFFY(entropy_coef=0.0).entropy_gradient) == (True, False)


@pytest.mark.parametrize(
    ("option", "value"),
    [("gamma", 0.0), ("gamma", -0.1), ("on_policy_clip", -0.1), ("on_policy_clip", 1.0), ("entropy_coef", -0.1)],
)
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(Refused, match=option):
        build_objective({"name": "luffy", option: value})
