"""SFT. Garbage, splits and precision: test_contract.py; aggregations: tests/oracles."""

import torch

from megapsft.objectives.sft import SFT
from megapsft.types import PolicyOutput
from tests.oracles.batches import microbatch

MASK = torch.tensor([[True, True, False]])

VARIANTS = [{"aggregation": "seq-mean-token-mean"}]


def losses_and_metrics():
    output = PolicyOutput(logprobs=torch.tensor([[-0.2, -1.1, -0.5]]), entropy=torch.zeros(1, 3))
    return SFT()(output, microbatch(MASK, MASK / 2))


def test_the_example_of_the_docstring():
    losses, _ = losses_and_metrics()
    assert torch.equal(losses, torch.tensor([[0.2, 1.1, 0.0]]))


def test_needs_no_second_pass_and_counts_nothing():
    assert SFT().needs == frozenset()
    assert SFT().totals_need is None


def test_its_ratio_is_one_by_definition():
    losses, metrics = losses_and_metrics()
    assert torch.equal(metrics["objective/nll"].values, losses)
    for key in ("objective/ratio_mean", "objective/ratio_max", "objective/ratio_min"):
        assert (metrics[key].values == 1).all()
    for key in ("objective/clip_fraction", "objective/ppo_kl"):
        assert (metrics[key].values == 0).all()
