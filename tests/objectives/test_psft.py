"""PSFT. Garbage, splits and precision: test_contract.py; more values and several updates a step: tests/oracles."""

import math

import pytest
import torch

from megapsft.objectives.psft import PSFT
from megapsft.objectives.sft import SFT
from megapsft.types import PolicyOutput
from tests.oracles.batches import microbatch

VARIANTS = [  # beside the defaults, for the contract
    {"clip_high": None},
    {"freeze_below": 0.1},
    {"old_policy": "reference"},
    {"entropy_threshold": 0.9},
    {"entropy_threshold": 0.9, "entropy_denominator": "selected"},
    {"aggregation": "sum-over-B-Lmax", "max_response_length": 7},
]


def evaluate(objective, logprobs, old_logprobs, old_entropy=None, weights=None):
    """(losses, gradient of their weighted sum, metrics); everything [S], all of it trained."""
    logprobs = torch.tensor([logprobs], requires_grad=True)
    mask = torch.ones(logprobs.shape, dtype=torch.bool)
    weights = torch.ones(logprobs.shape) if weights is None else weights
    old_entropy = None if old_entropy is None else torch.tensor([old_entropy])
    old_logprobs = torch.tensor([old_logprobs])
    batch = microbatch(mask, weights, old_logprobs=old_logprobs, old_entropy=old_entropy, ref_logprobs=old_logprobs + 0.1)
    losses, metrics = objective(PolicyOutput(logprobs=logprobs, entropy=torch.zeros(logprobs.shape)), batch)
    (gradient,) = torch.autograd.grad((weights * losses).sum(), logprobs)
    return losses.detach()[0], gradient[0], {key: metric.values[0] for key, metric in metrics.items()}


def test_the_example_of_the_docstring():
    losses, gradient, _ = evaluate(PSFT(), [-0.2, -1.1, -0.05], [-0.35, -1.0, -0.6])
    torch.testing.assert_close(losses, torch.tensor([-1.1618, -0.9048, -1.28]), atol=5e-5, rtol=0)
    torch.testing.assert_close(gradient, torch.tensor([-1.1618, -0.9048, 0.0]), atol=5e-5, rtol=0)
    assert losses.mean().item() == pytest.approx(-1.1156, abs=5e-5)


def test_at_ratio_one_the_gradient_is_that_of_sft_bitwise():
    logprobs = (-5 * torch.rand(512, generator=torch.Generator().manual_seed(0))).tolist()
    weights = torch.rand(1, 512, generator=torch.Generator().manual_seed(1))
    losses, gradient, metrics = evaluate(PSFT(), logprobs, logprobs, weights=weights)
    _, gradient_of_sft, _ = evaluate(SFT(), logprobs, logprobs, weights=weights)
    assert torch.equal(gradient, gradient_of_sft)
    assert (losses == -1).all()
    assert (metrics["objective/clip_fraction"] == 0).all()


def test_the_clip_is_one_sided():
    losses, gradient, metrics = evaluate(PSFT(clip_high=0.28), [-1.0, -1.0], [-2.0, -0.1])
    torch.testing.assert_close(losses, torch.tensor([-1.28, -math.exp(-0.9)]))  # the second fell far
    torch.testing.assert_close(gradient, torch.tensor([0.0, -math.exp(-0.9)]))
    assert metrics["objective/clip_fraction"].tolist() == [1, 0]


def test_frozen_from_below_as_well():
    losses, gradient, metrics = evaluate(PSFT(freeze_below=0.2), [-1.0, -1.0, -1.0], [-2.0, -0.1, -0.9])
    torch.testing.assert_close(losses, torch.tensor([-1.28, -0.8, -math.exp(-0.1)]))
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0.0, -math.exp(-0.1)]))
    assert metrics["objective/clip_fraction"].tolist() == [1, 1, 0]


def test_an_old_policy_that_is_never_refreshed_is_the_reference():
    objective = PSFT(old_policy="reference")
    assert objective.needs == {"ref_logprobs"}
    _, gradient, _ = evaluate(objective, [-1.0], [-1.2])
    torch.testing.assert_close(gradient, torch.tensor([-math.exp(0.1)]))  # the reference lies 0.1 above the old policy


def test_without_a_clip_the_ratio_is_free():
    losses, gradient, metrics = evaluate(PSFT(clip_high=None), [-0.5], [-2.5])
    torch.testing.assert_close(losses, torch.tensor([-math.exp(2.0)]))
    assert torch.equal(gradient, losses)
    assert (metrics["objective/clip_fraction"] == 0).all()


@pytest.mark.parametrize("clip_high", [0.28, None])
def test_log_ratios_beyond_twenty_are_held_and_have_no_gradient(clip_high):
    _, gradient, metrics = evaluate(PSFT(clip_high=clip_high), [-0.1, -150.0, -20.0], [-150.0, -0.1, -0.5])
    assert gradient[:2].tolist() == [0, 0]
    assert gradient[2] == -metrics["objective/ratio_mean"][2]  # 19.5 down: a tiny ratio, and still its gradient
    assert gradient[2] < 0
    torch.testing.assert_close(metrics["objective/ratio_mean"][:2], torch.tensor([math.exp(20), math.exp(-20)]))
    torch.testing.assert_close(metrics["objective/ppo_kl"], torch.tensor([-20.0, 20.0, 19.5]))


def test_every_token_clipped_is_a_gradient_of_zero():
    losses, gradient, _ = evaluate(PSFT(), [-0.1, -0.2], [-1.0, -1.5])
    torch.testing.assert_close(losses, torch.tensor([-1.28, -1.28]))
    assert gradient.tolist() == [0, 0]


def test_entropy_as_advantage_is_strict():
    objective = PSFT(entropy_threshold=0.672)
    assert objective.needs == {"old_logprobs", "old_entropy"}
    arguments = ([-1.0, -1.0, -1.0, -0.1], [-1.1, -1.1, -1.1, -1.0], [0.1, 0.672, 0.7, 0.1])
    losses, gradient, metrics = evaluate(objective, *arguments)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0.0, -math.exp(0.1), 0.0]))
    assert torch.equal(losses, gradient)
    assert (metrics["objective/clip_fraction"] == 0).all()  # the last is over the clip, and not selected


def test_counts_only_where_the_denominator_asks_for_it():
    mask = torch.tensor([[True, True, True, False]])
    batch = microbatch(mask, mask / 3, old_logprobs=torch.zeros(1, 4), old_entropy=torch.tensor([[0.5, 0.3, 0.31, 9.0]]))
    objective = PSFT(entropy_threshold=0.3, entropy_denominator="selected")
    assert objective.totals_need == {"old_entropy"}
    assert objective.totals(batch) == {"trained": 3, "selected": 2}
    assert PSFT(entropy_threshold=0.3).totals_need is None
    assert PSFT().totals_need is None
