"""DFT. Garbage, splits and precision: test_contract.py; more values and aggregations: tests/oracles."""

import math

import pytest
import torch

from megapsft.errors import Refused
from megapsft.objectives.dft import DFT
from megapsft.types import PolicyOutput
from tests.oracles.batches import microbatch

VARIANTS = [{"level": "sentence"}, {"level": "geometric_mean"}, {"aggregation": "seq-mean-token-sum"}]


def evaluate(objective, logprobs, mask=None, **fields):
    """(losses, gradient of their sum, metrics), each [B, S]; a row is a sample unless `fields` say otherwise."""
    logprobs = torch.tensor(logprobs, requires_grad=True)
    mask = torch.ones(logprobs.shape, dtype=torch.bool) if mask is None else torch.tensor(mask)
    batch = microbatch(mask, mask.float(), **fields)
    losses, metrics = objective(PolicyOutput(logprobs=logprobs, entropy=torch.zeros(logprobs.shape)), batch)
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    return losses.detach(), gradient, {key: metric.values for key, metric in metrics.items()}


def test_the_example_of_the_docstring():
    losses, gradient, metrics = evaluate(DFT(), [[-0.2, -1.1, -0.05]])
    torch.testing.assert_close(losses, torch.tensor([[0.1637, 0.3662, 0.0476]]), atol=5e-5, rtol=0)
    torch.testing.assert_close(gradient, torch.tensor([[-0.8187, -0.3329, -0.9512]]), atol=5e-5, rtol=0)
    assert losses.mean().item() == pytest.approx(0.1925, abs=5e-5)
    for key in ("objective/weight_mean", "objective/weight_min"):
        assert torch.equal(metrics[key], -gradient)


@pytest.mark.parametrize(
    ("level", "weights"),
    [("sentence", [math.exp(-1.3), math.exp(-0.5)]), ("geometric_mean", [math.exp(-0.65), math.exp(-0.5)])],
)
def test_one_weight_for_all_tokens_of_a_sample(level, weights):
    _, gradient, _ = evaluate(DFT(level=level), [[-0.2, -1.1], [-0.5, -9.0]], [[True, True], [True, False]])
    torch.testing.assert_close(gradient, -torch.tensor([[weights[0]] * 2, [weights[1], 0.0]]))


@pytest.mark.parametrize("level", ["sentence", "geometric_mean"])
def test_samples_packed_end_to_end_keep_their_own_weights(level):
    _, rows, _ = evaluate(DFT(level=level), [[-0.2, -1.1], [-0.5, -0.7]])
    ids = torch.tensor([[0, 0, 1, 1, -1]])
    mask = [[True, True, True, True, False]]
    _, packed, _ = evaluate(DFT(level=level), [[-0.2, -1.1, -0.5, -0.7, -3.0]], mask, sample_ids=ids, samples=2)
    assert torch.equal(packed[0, :4], rows.flatten())


@pytest.mark.parametrize("level", ["token", "sentence", "geometric_mean"])
@pytest.mark.parametrize("ruled_out", [-800.0, -math.inf])
def test_a_probability_that_underflows_is_a_weight_of_zero(level, ruled_out):
    losses, gradient, metrics = evaluate(DFT(level=level), [[ruled_out, 0.0]])
    certain = 1.0 if level == "token" else 0.0
    assert losses.tolist() == [[0, 0]]
    assert gradient.tolist() == [[0, -certain]]
    assert metrics["objective/weight_mean"].tolist() == [[0, certain]]


def test_an_unknown_level_is_refused():
    with pytest.raises(Refused, match="token, sentence, geometric_mean"):
        DFT(level="geometric")
