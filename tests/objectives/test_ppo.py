"""PPO: policy loss with advantages of every token, and value loss. More values: tests/oracles; gae: tests/advantages."""

import pytest
import torch

from megapsft.errors import Refused
from megapsft.metrics.names import METRICS
from megapsft.metrics.reduce import Reduction
from megapsft.objectives.grpo import GRPO
from megapsft.objectives.ppo import PPO
from megapsft.objectives.registry import build_objective
from megapsft.types import AdvantageOptions
from tests.objectives.on_rollouts import LOGPROBS, OLD_LOGPROBS, close, evaluate
from tests.oracles.batches import microbatch

VARIANTS = [  # beside the defaults, for the contract
    {"dual_clip": 3.0, "gamma": 0.99, "lam": 0.95, "whiten": False, "value_clip": None},
    {"kl_coef": 0.1, "reward_kl_coef": 0.05},
    {"tis": "token", "tis_cap": 1.1, "clip_low": None},
    {"tis": "sequence", "tis_batch_normalize": True, "clip_high": None},
    {"aggregation": "seq-mean-token-sum"},
]


def value_loss(objective, values, old_values, returns, mask=None):
    """(losses, gradient of their sum, metrics); everything [S]."""
    values = torch.tensor([values], requires_grad=True)
    mask = torch.ones(values.shape, dtype=torch.bool) if mask is None else torch.tensor([mask])
    batch = microbatch(mask, mask / 1, values=torch.tensor([old_values]), returns=torch.tensor([returns]))
    losses, metrics = objective.value_loss(values, batch)
    (gradient,) = torch.autograd.grad(losses.sum(), values)
    reduction = Reduction(objective.value_metrics)
    reduction.add(metrics, mask)
    return losses.detach(), gradient, reduction.finish()


def test_the_example_of_the_docstring():
    losses, gradient, _, loss = evaluate(PPO(), LOGPROBS, OLD_LOGPROBS, [0.5, -0.5, 1.0])
    close(losses, [-0.5809, 0.4524, -1.2])
    close(gradient, [-0.5809, 0.4524, 0.0])
    assert loss == pytest.approx(-0.4428, abs=5e-5)


def test_says_how_rewards_become_advantages():
    assert PPO().advantages == AdvantageOptions(estimator="gae", gamma=1.0, lam=1.0, whiten=True, kl_coef=0.0)
    options = PPO(gamma=0.99, lam=0.95, whiten=False, reward_kl_coef=0.05).advantages
    assert options == AdvantageOptions(estimator="gae", gamma=0.99, lam=0.95, whiten=False, kl_coef=0.05)
    assert PPO().needs == PPO(reward_kl_coef=0.05).needs == {"old_logprobs"}  # that KL is no part of the loss
    assert PPO(kl_coef=0.05).needs == {"old_logprobs", "ref_logprobs"}


def test_only_ppo_has_a_critic():
    assert PPO.critic
    assert not GRPO.critic
    with pytest.raises(Refused, match="norm_by_std"):  # advantages of groups are not what it reads
        build_objective({"name": "ppo", "norm_by_std": False})


def test_values_are_held_near_those_at_the_start_of_the_step():
    values, old_values, returns = [0.3, 1.0, 1.0, -1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.2, 2.0, 0.5]
    losses, gradient, metrics = value_loss(PPO(), values, old_values, returns)
    # near; outside, its own error the larger; outside, held at 0.5 and 1.5 away from 2; below, its own error the larger
    close(losses, [0.5 * 0.7**2, 0.5 * 0.8**2, 0.5 * 1.5**2, 0.5 * 1.5**2])
    close(gradient, [-0.7, 0.8, 0.0, -1.5])
    assert metrics["critic/clip_fraction"] == 0.25


@pytest.mark.parametrize(("value_clip", "loss"), [(0.5, 0.5 * 1.5**2), (0.8, 0.5 * 1.2**2), (None, 0.5)])
def test_how_far_is_an_option(value_clip, loss):
    losses, _, metrics = value_loss(PPO(value_clip=value_clip), [1.0], [0.0], [2.0])
    close(losses, [loss])
    assert metrics["critic/clip_fraction"] == (value_clip is not None)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e4])
def test_garbage_under_the_mask_reaches_nothing(garbage):
    clean = value_loss(PPO(), [0.3, 0.0, 1.0], [0.1, 0.0, 0.2], [1.0, 0.0, 2.0], [True, False, True])
    spoilt = value_loss(PPO(), [0.3, garbage, 1.0], [0.1, garbage, 0.2], [1.0, garbage, 2.0], [True, False, True])
    for one, other in zip(clean[:2], spoilt[:2], strict=True):
        assert torch.equal(one, other)
        assert other[0, 1] == 0
    assert clean[2] == spoilt[2]


def test_no_gradient_reaches_what_the_critic_said_before():
    old_values, returns = torch.zeros(1, 2, requires_grad=True), torch.ones(1, 2, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    losses, metrics = PPO().value_loss(
        torch.tensor([[0.9, 0.1]], requires_grad=True), microbatch(mask, mask / 2, values=old_values, returns=returns)
    )
    losses.sum().backward()
    assert old_values.grad is None
    assert returns.grad is None
    assert {key: metric.over for key, metric in metrics.items()} == PPO.value_metrics
    assert not any(metric.values.requires_grad for metric in metrics.values())
    assert PPO.value_metrics.keys() <= METRICS.keys()


@pytest.mark.parametrize(
    ("old_values", "expected"),
    [
        ([1.0, -1.0, 0.5, 2.0], 1.0),  # the returns themselves
        ([3.0, 1.0, 2.5, 4.0], 1.0),  # off by a constant
        ([0.0, 0.0, 0.0, 0.0], 0.0),  # a constant
        ([0.5, -0.5, 0.25, 1.0], 0.75),  # half of the way
    ],
)
def test_explained_variance(old_values, expected):
    _, _, reduced = value_loss(PPO(), [0.0] * 4, old_values, [1.0, -1.0, 0.5, 2.0])
    assert PPO.explained_variance(reduced) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gamma": 1.1}, "gamma=1.1: must lie in 0..1"),
        ({"lam": -0.1}, "lam=-0.1"),
        ({"reward_kl_coef": -0.1}, "reward_kl_coef=-0.1"),
        ({"value_clip": 0.0}, "value_clip=0.0: must be above 0"),
        ({"advantage": "group"}, "is not an option of PPO"),
    ],
)
def test_refuses_and_says_what_would_be_right(options, said):
    with pytest.raises(Refused) as refused:
        build_objective({"name": "ppo"} | options)
    assert said in str(refused.value)
