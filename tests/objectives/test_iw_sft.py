"""Importance-weighted SFT. Garbage, splits and precision: test_contract.py; more values: tests/oracles."""

import math

import pytest
import torch

from megapsft.errors import Refused
from megapsft.objectives.iw_sft import IWSFT
from megapsft.objectives.sft import SFT
from megapsft.types import PolicyOutput
from tests.oracles.batches import microbatch

VARIANTS = [
    {"level": "sequence"},
    {"level": "sequence", "temperature": 2.0},
    {"clip_low": 0.9, "clip_high": 1.1},
    {"level": "sequence", "clip_low": 0.9, "clip_high": 1.1},
]


def evaluate(objective, logprobs, ref_logprobs, mask=None):
    """(losses, gradient of their sum, metrics), each [B, S]; a row is a sample."""
    logprobs = torch.tensor(logprobs, requires_grad=True)
    mask = torch.ones(logprobs.shape, dtype=torch.bool) if mask is None else torch.tensor(mask)
    batch = microbatch(mask, mask.float(), ref_logprobs=torch.tensor(ref_logprobs))
    losses, metrics = objective(PolicyOutput(logprobs=logprobs, entropy=torch.zeros(logprobs.shape)), batch)
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    return losses.detach(), gradient, {key: metric.values for key, metric in metrics.items()}


def test_the_example_of_the_docstring():
    losses, gradient, metrics = evaluate(IWSFT(), [[-0.2, -1.1, -0.05]], [[-0.5, -0.9, -2.0]])
    torch.testing.assert_close(losses, torch.tensor([[0.27, 0.9006, 0.09]]), atol=5e-5, rtol=0)
    torch.testing.assert_close(gradient, torch.tensor([[-1.3499, -0.8187, -1.8]]), atol=5e-5, rtol=0)
    assert losses.mean().item() == pytest.approx(0.4202, abs=5e-5)
    for over in ("mean", "max", "min"):
        assert torch.equal(metrics[f"objective/weight_{over}"], -gradient)
    assert metrics["objective/weight_clip_fraction"].tolist() == [[0, 0, 1]]


def test_one_weight_for_all_tokens_of_a_sample():
    mask = [[True, True], [True, False]]
    _, gradient, _ = evaluate(IWSFT(level="sequence"), [[-0.2, -1.1], [-0.5, -9.0]], [[-0.5, -0.9], [-0.1, -1.0]], mask)
    torch.testing.assert_close(gradient, -torch.tensor([[math.exp(0.05)] * 2, [math.exp(-0.4), 0.0]]))


def test_temperature_multiplies_the_mean_log_ratio():
    _, gradient, _ = evaluate(IWSFT(level="sequence", temperature=2.0), [[-0.2, -1.1]], [[-0.5, -0.9]])
    torch.testing.assert_close(gradient, torch.full((1, 2), -math.exp(0.1)))


@pytest.mark.parametrize(("level", "low", "high"), [("token", 0.2, 1.8), ("sequence", math.exp(-20), 16.0)])
def test_each_level_has_its_own_clip(level, low, high):
    logprobs, ref_logprobs = [[-0.1], [-500.0]], [[-500.0], [-0.1]]
    _, gradient, metrics = evaluate(IWSFT(level=level), logprobs, ref_logprobs)
    torch.testing.assert_close(gradient, torch.tensor([[-high], [-low]]), rtol=1e-6, atol=0)
    assert metrics["objective/weight_clip_fraction"].tolist() == [[1], [low == 0.2]]  # exp(-20) is above the clip at 0


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_clip_of_ones_own(level):
    objective = IWSFT(level=level, clip_low=0.5, clip_high=3.0)
    _, gradient, _ = evaluate(objective, [[-0.1], [-9.0], [-1.0]], [[-9.0], [-0.1], [-1.5]])
    torch.testing.assert_close(gradient, -torch.tensor([[3.0], [0.5], [math.exp(0.5)]]))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_at_the_reference_it_is_sft_bitwise(level):
    logprobs = (-5 * torch.rand(4, 64, generator=torch.Generator().manual_seed(0))).tolist()
    ours, sft = evaluate(IWSFT(level=level), logprobs, logprobs), evaluate(SFT(), logprobs, logprobs)
    assert torch.equal(ours[0], sft[0])
    assert torch.equal(ours[1], sft[1])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"clip_low": -0.1}, "negative"),
        ({"clip_low": 1.9}, "empty range"),
        ({"clip_high": 0.1}, "empty range"),
        ({"temperature": 2.0}, "not used at level=token"),
        ({"temperature": 0.0, "level": "sequence"}, "above 0"),
        ({"level": "sentence"}, "token, sequence"),
    ],
)
def test_refuses_and_says_what_would_be_right(wrong, said):
    with pytest.raises(Refused, match=said):
        IWSFT(**wrong)
