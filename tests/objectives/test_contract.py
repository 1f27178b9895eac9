"""What every objective owes, whichever it is; a new file in `megapsft/objectives` is tested here without being named.

Its test file may list VARIANTS, options beside the defaults, which are then held to the same. Not here: values (tests/oracles),
and that the training step keeps its part: loss weights and totals over ranks (tests/invariants).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from megapsft.data.loss_weights import AGGREGATIONS
from megapsft.errors import Refused
from megapsft.metrics.names import METRICS
from megapsft.objectives._per_token import Aggregation
from megapsft.objectives.registry import build_objective, objective_class, objective_names
from megapsft.types import Microbatch, Objective, PolicyOutput
from tests.oracles.batches import microbatch, update_batch

FIELDS = {"old_logprobs", "old_entropy", "ref_logprobs", "ref_hidden", "rollout_logprobs", "entropy", "values", "returns"}


def variants(name: str) -> list[dict[str, Any]]:
    """The defaults, and what the objective's own test adds; on top of what is REQUIRED where there is no default."""
    try:
        module = importlib.import_module(f"tests.objectives.test_{name}")
    except ModuleNotFoundError:
        return [{}]
    required = getattr(module, "REQUIRED", {})
    return [required | options for options in [{}, *getattr(module, "VARIANTS", [])]]


OBJECTIVES = [
    pytest.param(build_objective({"name": name} | options), id="-".join([name, *map(str, options.values())]))
    for name in objective_names()
    for options in variants(name)
]
over_all = pytest.mark.parametrize("objective", OBJECTIVES)


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Made-up numbers of an update of six samples, the third of them not trained at all: [6, 7] each."""

    mask: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor
    term: torch.Tensor
    fields: dict[str, torch.Tensor]  # of the batch

    def under_mask(self, garbage: float) -> Numbers:
        def spoil(x: torch.Tensor) -> torch.Tensor:
            return torch.where(self.mask, x, garbage) if x.is_floating_point() else x

        fields = {key: spoil(x) for key, x in self.fields.items()}
        return Numbers(self.mask, spoil(self.logprobs), spoil(self.entropy), spoil(self.term), fields)

    def rows(self, chosen: torch.Tensor) -> Numbers:
        fields = {key: x[chosen] for key, x in self.fields.items()}
        return Numbers(self.mask[chosen], self.logprobs[chosen], self.entropy[chosen], self.term[chosen], fields)

    def to(self, dtype: torch.dtype) -> Numbers:
        def cast(x: torch.Tensor) -> torch.Tensor:
            return x.to(dtype) if x.is_floating_point() else x

        fields = {key: cast(x) for key, x in self.fields.items()}
        return Numbers(self.mask, cast(self.logprobs), cast(self.entropy), cast(self.term), fields)


@pytest.fixture
def numbers() -> Numbers:
    generator = torch.Generator().manual_seed(5)
    shape = (6, 7)

    def near(x: torch.Tensor, by: float) -> torch.Tensor:
        return x + by * torch.randn(shape, generator=generator)

    old = -3 * torch.rand(shape, generator=generator)
    old[1, 0] = -2.5
    entropy = 0.1 + 2 * torch.rand(shape, generator=generator)
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])[:, None].expand(shape)
    values = torch.randn(shape, generator=generator)
    logprobs, reference, rollout = (near(old, by).clamp(max=-0.01) for by in (0.6, 0.3, 0.2))
    logprobs[1, 0] = -0.5  # of a wrong rollout, and far more probable now: what a dual clip is for
    fields = {
        "old_logprobs": old,
        "old_entropy": near(entropy, 0.05),
        "ref_logprobs": reference,
        "rollout_logprobs": rollout,
        "entropy": entropy,
        "values": values,
        "returns": near(values, 0.5),
        "rewards": rewards,
        "advantages": (rewards - 0.6) * 2,
        "demonstration": torch.tensor([True, False, False, False, False, True])[:, None].expand(shape),
    }
    mask = torch.arange(7) < torch.tensor([7, 4, 0, 2, 5, 3])[:, None]
    return Numbers(mask, logprobs, entropy, torch.rand(shape, generator=generator), fields)


def batch_of(objective: Objective, numbers: Numbers) -> Microbatch:
    return update_batch(objective, numbers.mask, numbers.logprobs.dtype, **numbers.fields)


def evaluate(objective: Objective, numbers: Numbers, batch: Microbatch | None = None):
    """(loss, gradients of it in log-probabilities, entropy and term, metrics) of an update."""
    batch = batch or batch_of(objective, numbers)
    inputs = [x.clone().requires_grad_() for x in (numbers.logprobs, numbers.entropy, numbers.term)]
    logprobs, entropy, term = inputs
    losses, metrics = objective(PolicyOutput(logprobs=logprobs, entropy=entropy, term=term if objective.term else None), batch)
    loss = torch.where(batch.loss_mask, batch.loss_weights * losses, 0).sum()
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    return loss.detach(), [torch.zeros_like(numbers.logprobs) if g is None else g for g in gradients], metrics


@over_all
def test_trains_the_trained_tokens_and_no_others(objective, numbers):
    _, gradients, _ = evaluate(objective, numbers)
    assert any((gradient[numbers.mask] != 0).any() for gradient in gradients)
    assert all((gradient[~numbers.mask] == 0).all() for gradient in gradients)


@over_all
def test_has_gradients_where_it_says_so(objective, numbers):
    _, (logprobs, entropy, term), _ = evaluate(objective, numbers)
    assert (entropy != 0).any() == objective.entropy_gradient
    assert (term != 0).any() == (objective.term is not None)
    assert (logprobs != 0).any() or objective.term is not None


@over_all
def test_no_gradient_reaches_the_constants(objective, numbers):
    fields = {k: x.clone().requires_grad_() if x.is_floating_point() else x for k, x in numbers.fields.items()}
    batch = batch_of(objective, dataclasses.replace(numbers, fields=fields))
    entropy = numbers.entropy if objective.entropy_gradient else numbers.entropy.clone().requires_grad_()
    term = numbers.term.clone().requires_grad_() if objective.term else None
    output = PolicyOutput(logprobs=numbers.logprobs.clone().requires_grad_(), entropy=entropy, term=term)
    losses, _ = objective(output, batch)
    torch.where(batch.loss_mask, batch.loss_weights.detach() * losses, 0).sum().backward()
    assert entropy.grad is None
    assert {key: x.grad for key, x in fields.items() if x.grad is not None and x.grad.abs().max() > 0} == {}


@over_all
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e4, -1e4])
def test_garbage_under_the_mask_reaches_nothing(objective, numbers, garbage):
    clean_loss, clean_gradients, clean_metrics = evaluate(objective, numbers)
    loss, gradients, metrics = evaluate(objective, numbers.under_mask(garbage))
    assert torch.equal(loss, clean_loss)
    for gradient, clean in zip(gradients, clean_gradients, strict=True):
        assert torch.equal(gradient, clean)
    for key, metric in metrics.items():
        there = numbers.mask if metric.weights is None else metric.weights > 0
        assert torch.equal(metric.values[there], clean_metrics[key].values[there]), key
        assert metric.weights is None or torch.equal(metric.weights, clean_metrics[key].weights), key


@over_all
def test_nothing_to_train_is_a_loss_of_zero(objective, numbers):
    empty = dataclasses.replace(numbers, mask=torch.zeros_like(numbers.mask))
    loss, gradients, _ = evaluate(objective, empty.under_mask(math.nan))
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients)


@over_all
@pytest.mark.parametrize("cut", [[2, 2, 2], [4, 2], [2, 4]])
def test_the_gradient_does_not_depend_on_the_microbatches(objective, numbers, cut):
    whole = batch_of(objective, numbers)
    loss, gradients, metrics = evaluate(objective, numbers, whole)
    parts = []
    for rows in torch.arange(6).split(cut):
        part = numbers.rows(rows)
        batch = microbatch(part.mask, whole.loss_weights[rows], **part.fields)
        batch = dataclasses.replace(batch, sample_ids=whole.sample_ids[rows], samples=6, totals=whole.totals)
        parts.append(evaluate(objective, part, batch))
    for number, gradient in enumerate(gradients):
        torch.testing.assert_close(torch.cat([part[1][number] for part in parts]), gradient, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(sum(part[0] for part in parts), loss)
    for key, metric in metrics.items():
        torch.testing.assert_close(torch.cat([part[2][key].values for part in parts]), metric.values)


@over_all
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_the_precision_it_is_given(objective, numbers, dtype):
    loss, gradients, metrics = evaluate(objective, numbers.to(dtype))
    assert {loss.dtype, *(gradient.dtype for gradient in gradients)} == {dtype}
    assert {metric.values.dtype for metric in metrics.values()} == {dtype}


@over_all
def test_reports_what_it_announces_for_every_token(objective, numbers):
    _, _, metrics = evaluate(objective, numbers)
    assert {key: metric.over for key, metric in metrics.items()} == dict(objective.metrics)
    for key, metric in metrics.items():
        assert metric.values.shape == numbers.mask.shape, key
        assert not metric.values.requires_grad, key
        assert key in METRICS, key
        if metric.weights is not None:
            assert metric.weights.shape == numbers.mask.shape, key
            assert (metric.weights[~numbers.mask] == 0).all(), key


@over_all
def test_asks_for_what_it_reads(objective, numbers):
    given = objective.needs | (objective.totals_need or set())
    assert given <= FIELDS
    always = {"rewards", "advantages", "demonstration"}
    frugal = dataclasses.replace(numbers, fields={k: x for k, x in numbers.fields.items() if k in given | always})
    for gradient, rich in zip(evaluate(objective, frugal)[1], evaluate(objective, numbers)[1], strict=True):
        assert torch.equal(gradient, rich)


@over_all
def test_keeps_some_sample_of_a_group(objective):
    kept = objective.keep([1.0, 0.0, 1.0], [True, False, False])
    assert len(kept) == 3
    assert any(kept)


def test_objectives_know_the_aggregations_that_there_are():
    assert get_args(Aggregation) == AGGREGATIONS


def outcome(objective: Objective, numbers: Numbers) -> list[Any]:
    """All that an objective does: loss, gradients, what it makes of rewards, whom it keeps, its critic's loss."""
    loss, gradients, _ = evaluate(objective, numbers)
    found = [loss, *gradients, objective.advantages, objective.needs, objective.term]
    found += [tuple(objective.keep(rewards, [True, False, False])) for rewards in ([1, 0, 0], [1, 1, 0], [1, 1, 1])]
    if objective.critic:
        found.append(objective.value_loss(numbers.fields["values"] + 1, batch_of(objective, numbers))[0])
    return found


def differ(one: Objective, other: Objective, numbers: Numbers) -> bool:
    pairs = zip(outcome(one, numbers), outcome(other, numbers), strict=True)
    return any(not torch.equal(a, b) if isinstance(a, torch.Tensor) else a != b for a, b in pairs)


def others(hint: Any, value: Any) -> list[Any]:
    """Values that an option might have instead."""
    if get_origin(hint) is Literal:
        return [other for other in get_args(hint) if other != value]
    if hint is bool:
        return [not value]
    return [other for other in (None, 0, 1, 2, 7, 0.05, 0.5, 3.0) if other != value]


@pytest.mark.parametrize("name", objective_names())
def test_every_option_changes_the_result(name, numbers):
    """With one of the variants, and one of its values beside another. An option that never does must not exist."""
    hints = get_type_hints(objective_class(name))
    without_effect = set()
    for field in dataclasses.fields(objective_class(name)):
        over_lmax = {"aggregation": "sum-over-Lmax", "max_response_length": 7} if field.name == "max_response_length" else {}
        tried = [variant | over_lmax for variant in variants(name)]
        if not any(changes(name, variant, field.name, hints[field.name], numbers) for variant in tried):
            without_effect.add(field.name)
    assert not without_effect


def changes(name: str, variant: dict[str, Any], option: str, hint: Any, numbers: Numbers) -> bool:
    one = build_objective({"name": name} | variant)
    for value in others(hint, getattr(one, option)):
        with contextlib.suppress(Refused):  # not a value for it, or not with these others
            if differ(one, build_objective({"name": name} | variant | {option: value}), numbers):
                return True
    return False
