"""GSPO: one ratio a sample. More values: tests/oracles."""

import dataclasses
import math

import pytest
import torch
import torch.distributed as dist

from megapsft.errors import Refused
from megapsft.metrics.reduce import Reduction
from megapsft.objectives.gspo import GSPO
from megapsft.objectives.registry import build_objective
from megapsft.types import PolicyOutput
from tests.objectives.on_rollouts import LOGPROBS, OLD_LOGPROBS, close, evaluate
from tests.oracles.batches import microbatch
from tests.ranks import run_ranks

VARIANTS = [  # beside the defaults, for the contract; wide bounds, or nearly all made-up samples are clipped
    {"clip_low": 0.2, "clip_high": 0.28},
    {"clip_low": None, "clip_high": None, "kl_coef": 0.1},
    {"clip_high": 0.5, "tis": "token", "tis_cap": 1.1},
    {"clip_high": 0.5, "tis": "sequence", "tis_batch_normalize": True},
    {"clip_high": 0.5, "advantage": "rloo", "norm_by_std": False, "singleton": "zero"},
]
WIDE = GSPO(clip_low=0.2, clip_high=0.28)


def test_the_example_of_the_docstring():
    losses, gradient, metrics, loss = evaluate(WIDE, LOGPROBS, OLD_LOGPROBS, 0.5)
    close(losses, [-0.6107, -0.6107, -0.6107])
    close(gradient, [-0.6107, -0.6107, -0.6107])
    assert loss == pytest.approx(-0.6107, abs=5e-5)
    close(metrics["objective/sequence_ratio_mean"], [1.2214] * 3)
    close(metrics["objective/ratio_mean"], [1.1618, 0.9048, 1.7333])
    losses, gradient, metrics, _ = evaluate(GSPO(), LOGPROBS, OLD_LOGPROBS, 0.5)
    close(losses, [-0.5002] * 3)
    assert not gradient.any()
    assert metrics["objective/clip_fraction"].all()


def test_a_sample_is_clipped_as_a_whole_and_alone():
    logprobs = [[0.9, -0.1], [0.1, 0.1]]
    losses, gradient, metrics, _ = evaluate(WIDE, logprobs, 0.0, 1.0)
    close(losses, [[-1.28] * 2, [-math.exp(0.1)] * 2])
    close(gradient, [[0.0] * 2, [-math.exp(0.1)] * 2])
    assert metrics["objective/clip_fraction"].tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize(("options", "ratio"), [({"clip_low": 0.2}, 0.8), ({"clip_low": None}, math.exp(-0.5))])
def test_the_lower_bound_holds_negative_advantages(options, ratio):
    losses, _, _, _ = evaluate(GSPO(**options), [-0.5, -0.5], [0.0, 0.0], -1.0)
    close(losses, [ratio, ratio])


def test_a_mean_log_ratio_beyond_ten_is_held_and_has_no_gradient():
    losses, gradient, _, _ = evaluate(GSPO(), [[-1.0, -1.0], [-1.0, -9.0]], -12.0, -1.0)
    torch.testing.assert_close(losses, torch.tensor([[math.exp(10)] * 2, [math.exp(7)] * 2]))
    torch.testing.assert_close(gradient, torch.tensor([[0.0] * 2, [math.exp(7)] * 2]))


def test_samples_that_are_packed_are_still_samples():
    rows = torch.tensor([[0.3, -0.1], [0.2, 0.0]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    advantages = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    apart = microbatch(mask, mask / 4, old_logprobs=torch.zeros(2, 2), advantages=advantages)
    fields = ("loss_mask", "loss_weights", "sample_ids", "old_logprobs", "advantages", "rewards")
    flat = {name: getattr(apart, name).reshape(1, 4) for name in fields}
    packed = dataclasses.replace(apart, **flat)
    losses = [
        WIDE(PolicyOutput(logprobs=rows.view(batch.loss_mask.shape), entropy=rows), batch)[0] for batch in (apart, packed)
    ]
    assert torch.equal(losses[0].flatten(), losses[1].flatten())
    assert losses[0][0, 0] != losses[0][1, 0]


def of_columns(columns=None):
    """(losses, gradient, metrics) of two samples of three tokens; rank r holds the columns `columns[r]`, without ranks all."""
    if columns is not None:
        dist.init_process_group("gloo")
    group = dist.group.WORLD if columns is not None else None
    mine = slice(None) if columns is None else columns[dist.get_rank()]
    objective = GSPO(clip_low=0.2, clip_high=0.28, tis="sequence", tis_cap=1.3)
    mask = torch.tensor([[True, True, True], [True, False, True]])[:, mine]
    numbers = {
        "old_logprobs": torch.tensor([OLD_LOGPROBS, OLD_LOGPROBS]),
        "rollout_logprobs": torch.tensor([[-0.3, -1.1, -0.7], [-0.3, 9.0, -1.2]]),
        "advantages": torch.tensor([[1.0], [-1.0]]).expand(2, 3),
        "rewards": torch.tensor([[1.0], [0.0]]).expand(2, 3),
    }
    fields = {key: value[:, mine] for key, value in numbers.items()}
    batch = microbatch(mask, mask / 1, context_group=group, **fields)
    logprobs = torch.tensor([LOGPROBS, LOGPROBS])[:, mine].requires_grad_()
    losses, metrics = objective(PolicyOutput(logprobs=logprobs, entropy=logprobs.detach()), batch)
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    reduction = Reduction(objective.metrics)
    reduction.add(metrics, mask)
    return losses.detach(), gradient, reduction.finish(group)


def test_samples_cut_over_context_parallel_ranks_are_whole():
    losses, gradient, metrics = of_columns()
    assert metrics["reward/mean"] == pytest.approx(0.5)  # of samples, not of tokens
    assert metrics["objective/sequence_ratio_mean"] == pytest.approx((math.exp(0.2) + math.exp(0.35)) / 2)
    columns = [[0], [1, 2]]
    for mine, (part, part_gradient, reduced) in zip(columns, run_ranks(2, of_columns, columns), strict=True):
        torch.testing.assert_close(part, losses[:, mine])
        torch.testing.assert_close(part_gradient, gradient[:, mine])
        assert reduced == pytest.approx(metrics)


@pytest.mark.parametrize("options", [{"aggregation": "token-mean"}, {"max_response_length": 8}, {"dual_clip": 3.0}])
def test_the_aggregation_is_part_of_the_objective(options):
    assert GSPO().aggregation == "seq-mean-token-mean"
    with pytest.raises(Refused, match="is not an option of GSPO"):
        build_objective({"name": "gspo"} | options)
