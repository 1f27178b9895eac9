"""What every objective owes, whichever it is; a new file in `megapsft/objectives` is tested here without being named.

Not here: values (tests/oracles), and that the training step keeps its part (weights over ranks, selection).
"""

import dataclasses
import math
from typing import get_args

import pytest
import torch

from megapsft.data.loss_weights import AGGREGATIONS
from megapsft.metrics.names import METRICS
from megapsft.objectives._per_token import Aggregation
from megapsft.objectives.registry import build_objective, objective_names
from megapsft.types import PolicyOutput
from tests.oracles.batches import microbatch, update_batch

VARIANTS = {  # beside the defaults
    "psft": [
        {"clip_high": None},
        {"entropy_threshold": 0.9},
        {"entropy_threshold": 0.9, "entropy_denominator": "selected"},
        {"aggregation": "sum-over-B-Lmax", "max_response_length": 7},
    ],
    "sft": [{"aggregation": "seq-mean-token-mean"}],
}
OBJECTIVES = [
    pytest.param(build_objective({"name": name} | options), id="-".join([name, *map(str, options.values())]))
    for name in objective_names()
    for options in [{}, *VARIANTS.get(name, [])]
]
over_all = pytest.mark.parametrize("objective", OBJECTIVES)


@dataclasses.dataclass
class Numbers:
    """Made-up log-probabilities of an update of four samples, the third of them not trained at all."""

    mask: torch.Tensor
    logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    entropy: torch.Tensor

    def under_mask(self, garbage: float) -> "Numbers":
        fields = (torch.where(self.mask, x, garbage) for x in (self.logprobs, self.old_logprobs, self.entropy))
        return Numbers(self.mask, *fields)


@pytest.fixture
def numbers() -> Numbers:
    generator = torch.Generator().manual_seed(5)
    old_logprobs = -3 * torch.rand(4, 7, generator=generator)
    logprobs = old_logprobs + 0.6 * torch.randn(4, 7, generator=generator)
    entropy = 2 * torch.rand(4, 7, generator=generator)
    lengths = torch.tensor([[7], [4], [0], [2]])
    return Numbers(torch.arange(7) < lengths, logprobs, old_logprobs, entropy)


def evaluate(objective, numbers, batch=None):
    """(loss, gradient [B, S], metrics) of an update."""
    if batch is None:
        batch = update_batch(objective, numbers.mask, numbers.logprobs.dtype, numbers.old_logprobs, numbers.entropy)
    logprobs = numbers.logprobs.clone().requires_grad_()
    losses, metrics = objective(PolicyOutput(logprobs=logprobs, entropy=numbers.entropy), batch)
    loss = (batch.loss_weights * losses).sum()
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), gradient, metrics


@over_all
def test_trains_the_trained_tokens_and_no_others(objective, numbers):
    _, gradient, _ = evaluate(objective, numbers)
    assert (gradient[numbers.mask] != 0).any()
    assert (gradient[~numbers.mask] == 0).all()


@over_all
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e4, -1e4])
def test_garbage_under_the_mask_reaches_nothing(objective, numbers, garbage):
    clean_loss, clean_gradient, clean_metrics = evaluate(objective, numbers)
    loss, gradient, metrics = evaluate(objective, numbers.under_mask(garbage))
    assert torch.equal(loss, clean_loss)
    assert torch.equal(gradient, clean_gradient)
    for key, metric in metrics.items():
        assert torch.equal(metric.values[numbers.mask], clean_metrics[key].values[numbers.mask]), key


@over_all
def test_nothing_to_train_is_a_loss_of_zero(objective, numbers):
    empty = dataclasses.replace(numbers, mask=torch.zeros_like(numbers.mask))
    loss, gradient, _ = evaluate(objective, empty.under_mask(math.nan))
    assert loss == 0
    assert (gradient == 0).all()


@over_all
@pytest.mark.parametrize("cut", [[1, 1, 1, 1], [2, 2], [1, 3], [3, 1]])
def test_the_gradient_does_not_depend_on_the_microbatches(objective, numbers, cut):
    whole = update_batch(objective, numbers.mask, torch.float32, numbers.old_logprobs, numbers.entropy)
    loss, gradient, _ = evaluate(objective, numbers, whole)
    parts = []
    for rows in torch.arange(4).split(cut):
        part = Numbers(*(x[rows] for x in (numbers.mask, numbers.logprobs, numbers.old_logprobs, numbers.entropy)))
        batch = microbatch(part.mask, whole.loss_weights[rows], part.old_logprobs, part.entropy)
        parts.append(evaluate(objective, part, batch))
    assert torch.equal(torch.cat([part[1] for part in parts]), gradient)
    torch.testing.assert_close(sum(part[0] for part in parts), loss)


@over_all
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_the_precision_it_is_given(objective, numbers, dtype):
    fields = (x.to(dtype) for x in (numbers.logprobs, numbers.old_logprobs, numbers.entropy))
    loss, gradient, metrics = evaluate(objective, Numbers(numbers.mask, *fields))
    assert loss.dtype == gradient.dtype == dtype
    assert {metric.values.dtype for metric in metrics.values()} == {dtype}


@over_all
def test_reports_what_it_announces_for_every_token(objective, numbers):
    _, _, metrics = evaluate(objective, numbers)
    assert {key: metric.over for key, metric in metrics.items()} == dict(objective.metrics)
    for key, metric in metrics.items():
        assert metric.values.shape == numbers.mask.shape, key
        assert not metric.values.requires_grad, key
        assert key in METRICS


@over_all
def test_asks_for_what_it_reads(objective, numbers):
    assert objective.needs <= {"old_logprobs", "old_entropy"}
    given = {"old_logprobs": numbers.old_logprobs, "old_entropy": numbers.entropy}
    weights = numbers.mask.float()
    frugal = microbatch(numbers.mask, weights, **{need: given[need] for need in objective.needs})
    rich = microbatch(numbers.mask, weights, **given)
    assert torch.equal(evaluate(objective, numbers, frugal)[1], evaluate(objective, numbers, rich)[1])


def test_objectives_know_the_aggregations_that_there_are():
    assert get_args(Aggregation) == AGGREGATIONS
