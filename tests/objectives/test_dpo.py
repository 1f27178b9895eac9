"""DPO. Garbage, splits and precision: test_contract.py; more values: tests/oracles."""

import math

import pytest
import torch
import torch.distributed as dist

from megapsft.errors import Refused
from megapsft.metrics.reduce import Reduction
from megapsft.objectives.dpo import DPO
from megapsft.objectives.registry import build_objective
from megapsft.types import PolicyOutput
from tests.oracles.batches import microbatch
from tests.ranks import run_ranks

VARIANTS = [{"beta": 0.1}, {"beta": 0.1, "label_smoothing": 0.2}]

# two pairs: two tokens against one, and two against none
LOGPROBS = torch.tensor([[-0.2, -1.1, -7.0], [-0.4, -7.0, -7.0], [-0.3, -0.6, -2.0], [-7.0, -7.0, -7.0]])
REF_LOGPROBS = torch.tensor([[-0.5, -0.9, -8.0], [-1.0, -8.0, -8.0], [-0.2, -0.5, -1.0], [-8.0, -8.0, -8.0]])
MASK = torch.arange(3) < torch.tensor([2, 1, 2, 0])[:, None]


def evaluate(objective, logprobs=LOGPROBS, ref_logprobs=REF_LOGPROBS, mask=MASK, **fields):
    """(losses, gradient of their sum, metrics), each [B, S]; a row is a sample unless `fields` say otherwise."""
    logprobs = logprobs.clone().requires_grad_()
    batch = microbatch(mask, mask.float(), ref_logprobs=ref_logprobs, **fields)
    losses, metrics = objective(PolicyOutput(logprobs=logprobs, entropy=torch.zeros(logprobs.shape)), batch)
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    return losses.detach(), gradient, metrics


def reduced(objective, metrics, mask=MASK):
    reduction = Reduction(objective.metrics)
    reduction.add(metrics, mask)
    return reduction.finish()


def test_the_example_of_the_docstring():
    losses, gradient, metrics = evaluate(DPO(beta=0.1), LOGPROBS[:2], REF_LOGPROBS[:2], MASK[:2])
    torch.testing.assert_close(losses, 0.2395 * MASK[:2], atol=5e-5, rtol=0)
    expected = torch.tensor([[-0.0512, -0.0512, 0.0], [0.0512, 0.0, 0.0]])
    torch.testing.assert_close(gradient, expected, atol=5e-5, rtol=0)
    assert losses.sum().item() == pytest.approx(0.7185, abs=5e-5)
    means = reduced(DPO(), metrics, MASK[:2])
    assert means["rewards/chosen"] == pytest.approx(0.01)
    assert means["rewards/rejected"] == pytest.approx(0.06)


def test_a_side_without_tokens_has_the_log_probability_zero():
    losses, gradient, _ = evaluate(DPO(beta=0.1))
    torch.testing.assert_close(losses[2:], MASK[2:] * math.log1p(math.exp(0.02)) / 4)
    torch.testing.assert_close(gradient[2:], MASK[2:] * -0.05 / (1 + math.exp(-0.02)))


def test_means_are_over_pairs_and_not_over_tokens():
    means = reduced(DPO(), evaluate(DPO(beta=0.1))[2])
    expected = {
        "rewards/chosen": (0.01 - 0.02) / 2,
        "rewards/rejected": (0.06 + 0.0) / 2,
        "rewards/margins": (-0.05 - 0.02) / 2,
        "rewards/accuracies": 0.0,
        "logps/chosen": (-1.3 - 0.9) / 2,
        "logps/rejected": (-0.4 + 0.0) / 2,
    }
    assert {key: means[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert means["objective/nll"] == pytest.approx((1.3 + 0.4 + 0.9) / 5)  # of tokens, both sides


def test_accuracy_is_strict():
    better = LOGPROBS + torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    reference = torch.cat([REF_LOGPROBS[:2], LOGPROBS[2:]])  # the second pair is as the reference has it
    assert reduced(DPO(), evaluate(DPO(), better, reference)[2])["rewards/accuracies"] == pytest.approx(0.5)


def test_the_policy_at_the_reference_has_the_loss_log_two():
    losses, gradient, _ = evaluate(DPO(beta=0.1), LOGPROBS, LOGPROBS)
    assert losses.sum().item() == pytest.approx(math.log(2))
    torch.testing.assert_close(gradient, torch.where(MASK, torch.tensor([[-1.0], [1.0], [-1.0], [1.0]]) * 0.025, 0.0))


def test_label_smoothing_turns_the_gradient_where_the_margin_is_large():
    surer = LOGPROBS + torch.tensor([[50.0], [0.0], [0.0], [0.0]])
    _, plain, _ = evaluate(DPO(beta=0.1), surer)
    _, smoothed, _ = evaluate(DPO(beta=0.1, label_smoothing=0.1), surer)
    assert plain[0, 0] < 0 < smoothed[0, 0]
    assert smoothed[0, 0].item() == pytest.approx(0.05 * 0.1, rel=1e-2)


@pytest.mark.parametrize(("shift", "value", "slope"), [(-1e4, 1e3, -0.05), (1e4, 0.0, 0.0)])
def test_extreme_margins_stay_finite(shift, value, slope):
    far = LOGPROBS + torch.tensor([[shift / 2], [0.0], [0.0], [0.0]])
    losses, gradient, _ = evaluate(DPO(beta=0.1), far)
    assert losses[:2].sum().item() == pytest.approx(value / 2, rel=1e-3)
    assert gradient[0, :2].tolist() == pytest.approx([slope, slope])


def test_a_pair_without_tokens_counts_in_the_denominator_alone():
    mask = MASK & torch.tensor([True, True, False, False])[:, None]
    losses, gradient, metrics = evaluate(DPO(beta=0.1), mask=mask)
    alone_losses, alone_gradient, alone_metrics = evaluate(DPO(beta=0.1), LOGPROBS[:2], REF_LOGPROBS[:2], MASK[:2])
    torch.testing.assert_close(losses[:2], alone_losses / 2)
    torch.testing.assert_close(gradient[:2], alone_gradient / 2)
    assert losses[2:].abs().sum() == 0
    assert reduced(DPO(), metrics, mask) == pytest.approx(reduced(DPO(), alone_metrics, MASK[:2]))


def test_pairs_of_other_microbatches_contribute_nothing():
    whole, gradient, _ = evaluate(DPO(beta=0.1))
    ids = torch.tensor([[2], [3]]).expand(2, 3)
    arguments = (LOGPROBS[2:], REF_LOGPROBS[2:], MASK[2:])
    part, part_gradient, metrics = evaluate(DPO(beta=0.1), *arguments, sample_ids=ids, samples=4)
    assert torch.equal(part, whole[2:])
    assert torch.equal(part_gradient, gradient[2:])
    assert reduced(DPO(), metrics, MASK[2:])["rewards/chosen"] == pytest.approx(-0.02)


def of_a_slice(rank_columns):
    """Rank r holds the columns `rank_columns[r]` of every sample."""
    dist.init_process_group("gloo")
    mine = rank_columns[dist.get_rank()]
    arguments = (LOGPROBS[:, mine], REF_LOGPROBS[:, mine], MASK[:, mine])
    losses, gradient, metrics = evaluate(DPO(beta=0.1), *arguments, context_group=dist.group.WORLD)
    reduction = Reduction(DPO.metrics)
    reduction.add(metrics, MASK[:, mine])
    return losses, gradient, reduction.finish(dist.group.WORLD)


def test_samples_cut_over_context_parallel_ranks_are_whole():
    losses, gradient, metrics = evaluate(DPO(beta=0.1))
    columns = [[0], [1, 2]]
    for mine, (part, part_gradient, means) in zip(columns, run_ranks(2, of_a_slice, columns), strict=True):
        torch.testing.assert_close(part, losses[:, mine])
        torch.testing.assert_close(part_gradient, gradient[:, mine])
        assert means == pytest.approx(reduced(DPO(), metrics))


def test_trains_on_preferences_whose_tokens_all_weigh_the_same():
    assert DPO.trains_on == {"preferences"}
    assert DPO.aggregation == "token-sum"
    assert DPO().needs == {"ref_logprobs"}
    with pytest.raises(Refused, match="not an option"):
        build_objective({"name": "dpo", "aggregation": "token-mean"})


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"beta": 0.0}, "above 0"), ({"label_smoothing": -0.1}, "0..0.5"), ({"label_smoothing": 0.6}, "0..0.5")],
)
def test_refuses_and_says_what_would_be_right(wrong, said):
    with pytest.raises(Refused, match=said):
        DPO(**wrong)
