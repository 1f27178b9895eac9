"""HPT. Garbage, splits and precision: test_contract.py."""

import math

import pytest
import torch

from megapsft.errors import Refused
from megapsft.objectives.hpt import HPT
from megapsft.objectives.registry import build_objective
from megapsft.types import AdvantageOptions, PolicyOutput
from tests.oracles.batches import update_batch

VARIANTS = [  # beside the defaults, for the contract
    {"sft_coef": 0.3},
    {"clip": None},
    {"entropy_coef": 0.01},
    {"norm_by_std": True},
    {"gate": 1},
    {"gate": None},
    {"aggregation": "seq-mean-token-mean"},
]
OLD, ADVANTAGES = [[math.nan, math.nan], [-1.0, -0.6]], [[0.0, 0.0], [0.5, 0.5]]


def evaluate(objective, logprobs, entropy=None):
    """(losses, gradient before the weights, metrics, batch) of a demonstration and a rollout; the demonstration has one token."""
    logprobs = torch.tensor(logprobs, requires_grad=True)
    batch = update_batch(
        objective, torch.tensor([[True, False], [True, True]]), torch.float32, old_logprobs=torch.tensor(OLD),
        advantages=torch.tensor(ADVANTAGES), demonstration=torch.tensor([[True, True], [False, False]]),
    )  # fmt: skip
    entropy = torch.zeros(logprobs.shape) if entropy is None else torch.tensor(entropy)
    losses, metrics = objective(PolicyOutput(logprobs=logprobs, entropy=entropy), batch)
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    return losses.detach(), gradient, metrics, batch


def test_the_example_of_the_docstring():
    losses, gradient, metrics, _ = evaluate(HPT(aggregation="token-mean"), [[-0.7, 0.0], [-1.1, -0.2]])
    torch.testing.assert_close(losses, torch.tensor([[2.1, 0.0], [-0.4524, -0.6]]), atol=5e-5, rtol=0)
    torch.testing.assert_close(gradient, torch.tensor([[-3.0, 0.0], [-0.4524, 0.0]]), atol=5e-5, rtol=0)
    assert metrics["objective/clip_fraction"].values.tolist() == [[0, 0], [0, 1]]
    assert metrics["hpt/demonstration_tokens"].values.tolist() == [[1, 0], [0, 0]]


def test_demonstrations_are_a_mean_whatever_the_aggregation():
    for options in ({}, {"aggregation": "token-mean"}, {"aggregation": "seq-mean-token-sum"}):
        losses, _, _, batch = evaluate(HPT(sft_coef=0.3, **options), [[-0.7, 0.0], [-1.1, -0.2]])
        assert (batch.loss_weights * losses)[0].sum().item() == pytest.approx(0.3 * 0.7)


def test_the_parts_are_the_loss():
    losses, _, metrics, batch = evaluate(HPT(), [[-0.7, 0.0], [-1.1, -0.2]])
    parts = [(metrics[key].values * metrics[key].weights).sum().item() for key in ("hpt/sft", "hpt/rl")]
    assert sum(parts) == pytest.approx((batch.loss_weights * losses).sum().item())
    assert parts == pytest.approx([0.7, -(0.5 * math.exp(-0.1) + 0.6) / 8192])


def test_without_a_clip_the_ratio_is_free():
    _, gradient, metrics, _ = evaluate(HPT(clip=None), [[-0.7, 0.0], [-1.1, -0.2]])
    assert gradient[1, 1].item() == pytest.approx(-0.5 * math.exp(0.4))
    assert not metrics["hpt/on_clip_fraction"].values.any()


def test_the_bonus_is_on_every_token():
    logprobs, entropy = [[-0.7, 0.0], [-1.1, -0.2]], [[0.5, 9.0], [1.0, 2.0]]
    (plain, *_), (with_bonus, *_) = (evaluate(HPT(entropy_coef=c), logprobs, entropy) for c in (0.0, 0.1))
    torch.testing.assert_close(with_bonus - plain, torch.tensor([[-0.05, 0.0], [-0.1, -0.2]]), atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("gate", "rewards", "demonstrations", "kept"),
    [
        (0, [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1]),  # none is correct: imitate
        (0, [0, 1, 0, 1], [0, 0, 0, 1], [1, 1, 1, 0]),  # one is
        (1, [0, 1, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1]),  # one is not enough
        (1, [1, 1, 0, 1], [0, 0, 0, 1], [1, 1, 1, 0]),
        (0, [-1, -1, 0.5, 1], [0, 0, 0, 1], [0, 0, 0, 1]),  # half a reward is not correct
        (0, [0, 0], [0, 0], [1, 1]),  # nothing to imitate
        (0, [1, 0, 1], [1, 0, 1], [1, 0, 1]),  # two demonstrations, and neither counts as a correct rollout
        (0, [1], [1], [1]),
        (None, [0, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1]),  # both, whatever came of it
        (None, [0, 1, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1]),
    ],
)
def test_a_prompt_is_imitated_or_explored(gate, rewards, demonstrations, kept):
    assert HPT(gate=gate).keep(rewards, [bool(flag) for flag in demonstrations]) == [bool(flag) for flag in kept]


def test_it_says_what_it_needs():
    objective = HPT()
    assert (objective.needs, objective.trains_on, objective.totals_need) == ({"old_logprobs"}, {"rollouts"}, set())
    assert objective.advantages == AdvantageOptions(estimator="group", norm_by_std=False, demonstrations=False)
    assert HPT(norm_by_std=True).advantages.norm_by_std
    assert (objective.aggregation, objective.max_response_length) == ("sum-over-Lmax", 8192)


@pytest.mark.parametrize(
    ("option", "value"), [("gate", -1), ("sft_coef", 0.0), ("clip", -0.1), ("clip", 1.0), ("entropy_coef", -0.1)]
)
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(Refused, match=option):
        build_objective({"name": "hpt", option: value})
