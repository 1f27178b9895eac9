"""SFT with a KL. Garbage, splits and precision: test_contract.py; the exact divergences over a vocabulary: tests/oracles."""

import math

import pytest
import torch

from megapsft.errors import Refused
from megapsft.objectives.sft import SFT
from megapsft.objectives.sft_kl import SFTKL
from megapsft.types import PolicyOutput, VocabularyTerm
from tests.oracles.batches import microbatch

VARIANTS = [{"kl": "forward"}, {"kl": "k3"}, {"kl_coef": 0.0}, {"kl": "k3", "kl_coef": 0.2}]


def evaluate(objective, logprobs, ref_logprobs=None, term=None):
    """(losses, their gradients in the log-probabilities and in the term, metrics); everything [S], all of it trained."""
    logprobs = torch.tensor([logprobs], requires_grad=True)
    term = None if term is None else torch.tensor([term], requires_grad=True)
    mask = torch.ones(logprobs.shape, dtype=torch.bool)
    batch = microbatch(mask, mask.float(), ref_logprobs=None if ref_logprobs is None else torch.tensor([ref_logprobs]))
    losses, metrics = objective(PolicyOutput(logprobs=logprobs, entropy=torch.zeros(logprobs.shape), term=term), batch)
    losses.sum().backward()
    return losses.detach()[0], logprobs.grad[0], None if term is None else term.grad[0], metrics


def test_the_example_of_the_docstring():
    losses, gradient, _, metrics = evaluate(SFTKL(kl="k3"), [-0.2, -1.1, -0.05], [-0.5, -0.9, -0.4])
    torch.testing.assert_close(losses, torch.tensor([0.2204, 1.1107, 0.0773]), atol=5e-5, rtol=0)
    torch.testing.assert_close(gradient, torch.tensor([-0.8704, -1.1107, -0.8523]), atol=5e-5, rtol=0)
    assert losses.mean().item() == pytest.approx(0.4695, abs=5e-5)
    torch.testing.assert_close(metrics["objective/kl"].values, torch.tensor([[0.0408, 0.0214, 0.0547]]), atol=5e-5, rtol=0)


@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_the_term_of_the_head_is_added(kl):
    objective = SFTKL(kl=kl, kl_coef=0.2)
    assert objective.needs == {"ref_hidden"}
    assert objective.term == VocabularyTerm(kind=f"{kl}_kl")
    losses, gradient, of_term, metrics = evaluate(objective, [-0.2, -1.1], term=[0.5, 2.0])
    torch.testing.assert_close(losses, torch.tensor([0.3, 1.5]))
    assert gradient.tolist() == [-1, -1]
    torch.testing.assert_close(of_term, torch.tensor([0.2, 0.2]))
    assert metrics["objective/kl"].values.tolist() == [[0.5, 2.0]]


@pytest.mark.parametrize("kl", ["reverse", "k3"])
def test_losses_are_zero_where_masked(kl):
    mask, garbage = torch.tensor([[True, False]]), torch.tensor([[0.5, math.nan]])
    output = PolicyOutput(logprobs=-garbage, entropy=garbage, term=garbage if kl == "reverse" else None)
    losses, _ = SFTKL(kl=kl)(output, microbatch(mask, mask.float(), ref_logprobs=-garbage))
    assert losses[0, 0] >= 0.5
    assert losses[0, 1] == 0


def test_k3_reads_the_reference_and_asks_the_head_for_nothing():
    assert SFTKL(kl="k3").needs == {"ref_logprobs"}
    assert SFTKL(kl="k3").term is None


@pytest.mark.parametrize("kl", ["reverse", "forward", "k3"])
def test_without_the_kl_it_is_sft_bitwise_and_needs_nothing(kl):
    objective = SFTKL(kl=kl, kl_coef=0.0)
    assert objective.needs == frozenset()
    assert objective.term is None
    assert objective.metrics == SFT.metrics
    logprobs = (-5 * torch.rand(512, generator=torch.Generator().manual_seed(0))).tolist()
    losses, gradient, _, metrics = evaluate(objective, logprobs)
    of_sft, gradient_of_sft, _, metrics_of_sft = evaluate(SFT(), logprobs)
    assert torch.equal(losses, of_sft)
    assert torch.equal(gradient, gradient_of_sft)
    assert metrics.keys() == metrics_of_sft.keys()


def test_k3_is_held_at_its_limits_without_a_gradient():
    ref_logprobs = [-1.0 + 2.3, -1.0 + 3.0, -1.0 + 500.0, -1.0 - 25.0, -1.0 - 9.0]
    losses, gradient, _, metrics = evaluate(SFTKL(kl="k3", kl_coef=1.0), [-1.0] * 5, ref_logprobs)
    kl = torch.tensor([math.exp(2.3) - 3.3, 10.0, 10.0, 10.0, math.exp(-9) + 8])
    torch.testing.assert_close(metrics["objective/kl"].values[0], kl)
    torch.testing.assert_close(losses, 1 + kl)
    torch.testing.assert_close(gradient, torch.tensor([-math.exp(2.3), -1.0, -1.0, -1.0, -math.exp(-9)]))


def test_k3_keeps_its_digits_near_the_reference():
    _, _, _, metrics = evaluate(SFTKL(kl="k3"), [-0.0, -0.0], [1e-3, -1e-3])
    torch.testing.assert_close(metrics["objective/kl"].values, torch.tensor([[5.0017e-7, 4.9983e-7]]), rtol=2e-4, atol=0)


@pytest.mark.parametrize(("wrong", "said"), [({"kl_coef": -0.1}, "0 or more"), ({"kl": "k2"}, "reverse, forward, k3")])
def test_refuses_and_says_what_would_be_right(wrong, said):
    with pytest.raises(Refused, match=said):
        SFTKL(**wrong)
