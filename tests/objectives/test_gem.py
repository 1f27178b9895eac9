"""GEM, with the head that computes its term. Garbage, splits and precision: test_contract.py; more values: tests/oracles."""

import pytest
import torch

from megapsft.errors import Refused
from megapsft.objectives.gem import GEM
from megapsft.types import PolicyOutput, VocabularyTerm
from tests.oracles.batches import microbatch
from tests.oracles.offline import at_logits

VARIANTS = [{"beta": 0.5}, {"h": "logsigmoid"}, {"aggregation": "seq-mean-token-mean"}]

LOGITS = [[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]]


def evaluate(objective):
    case = {"inputs": {"logits": LOGITS, "labels": [0, 0, 0], "mask": [1, 1, 1]}}
    result = at_logits(objective, case, torch.float64)
    return result["loss"], torch.tensor(result["grad_logits"])


def test_the_example_of_the_docstring():
    loss, gradient = evaluate(GEM())
    assert loss == pytest.approx(0.5942, abs=5e-5)
    expected = torch.tensor([[-0.0543, 0.0543], [-0.9457, 0.9457], [-0.5, 0.5]]) / 3
    torch.testing.assert_close(gradient, expected, atol=2e-5, rtol=0)


def test_at_beta_one_the_gradient_is_that_of_sft():
    _, gradient = evaluate(GEM(beta=1.0))
    softmax = torch.tensor(LOGITS).softmax(-1)
    torch.testing.assert_close(gradient, (softmax - torch.tensor([1.0, 0.0])) / 3)


def test_logsigmoid_is_about_half():
    _, linear = evaluate(GEM())
    _, logsigmoid = evaluate(GEM(h="logsigmoid"))
    torch.testing.assert_close(logsigmoid, linear / 2, rtol=0.02, atol=0)
    assert not torch.equal(logsigmoid, linear / 2)


def test_the_loss_is_the_term_alone():
    logprobs = torch.tensor([[-0.2, -1.1, -0.5]], requires_grad=True)
    term = torch.tensor([[-0.1086, 1.8914, 7.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    output = PolicyOutput(logprobs=logprobs, entropy=torch.zeros(1, 3), term=term)
    losses, metrics = GEM()(output, microbatch(mask, mask / 2))
    assert losses.tolist() == [[term[0, 0].item(), term[0, 1].item(), 0]]
    losses.sum().backward()
    assert term.grad.tolist() == [[1, 1, 0]]
    assert logprobs.grad is None
    assert torch.equal(metrics["objective/nll"].values[mask], -logprobs.detach()[mask])


def test_asks_the_head_for_its_term_and_for_no_second_pass():
    assert GEM(beta=0.5, h="logsigmoid").term == VocabularyTerm(kind="gem", beta=0.5, h="logsigmoid")
    assert GEM().needs == frozenset()


@pytest.mark.parametrize(("wrong", "said"), [({"beta": 0.0}, "above 0"), ({"h": "sigmoid"}, "linear, logsigmoid")])
def test_refuses_and_says_what_would_be_right(wrong, said):
    with pytest.raises(Refused, match=said):
        GEM(**wrong)
