"""SRFT. Garbage, splits and precision: test_contract.py; more values: tests/oracles."""

import math

import pytest
import torch

from megapsft.errors import Refused
from megapsft.metrics.reduce import Reduction
from megapsft.objectives.registry import build_objective
from megapsft.objectives.srft import SRFT
from megapsft.types import AdvantageOptions, PolicyOutput
from tests.oracles.batches import update_batch

VARIANTS = [  # beside the defaults, for the contract
    {"variant": "hpt", "max_response_length": 7},
    {"entropy_level": "token"},
    {"entropy_level": "batch"},
    {"sft_coef": None},
    {"rl_coef": None},
    {"gamma": 0.1},
    {"entropy_coef": 0.01},
    {"norm_by_std": False},
    {"aggregation": "seq-mean-token-mean"},
]
LOGPROBS, ENTROPY = [[-0.2], [-0.7], [-1.5]], [[0.1], [0.4], [1.2]]  # a demonstration, a correct and a wrong rollout


def evaluate(
    objective, logprobs=LOGPROBS, entropy=ENTROPY, demonstration=(1, 0, 0), rewards=(1.0, 1.0, 0.0), advantages=(0.5, 0.5, -1.0)
):
    """(losses, their gradient before the weights, metrics, (loss, gradient of it)); one row a sample, all of it trained."""
    logprobs = torch.tensor(logprobs, dtype=torch.float64, requires_grad=True)
    entropy = torch.tensor(entropy, dtype=torch.float64)
    mask = torch.ones(logprobs.shape, dtype=torch.bool)

    def rows(values):
        return torch.tensor(values)[:, None].expand(mask.shape)

    batch = update_batch(
        objective, mask, torch.float64, demonstration=rows(demonstration).bool(), rewards=rows(rewards),
        advantages=rows(advantages), entropy=entropy,
    )  # fmt: skip
    losses, metrics = objective(PolicyOutput(logprobs=logprobs, entropy=entropy), batch)
    (plain,) = torch.autograd.grad(losses.sum(), logprobs, retain_graph=True)
    loss = (batch.loss_weights * losses).sum()
    (gradient,) = torch.autograd.grad(loss, logprobs)
    reduction = Reduction(objective.metrics)
    reduction.add(metrics, mask)
    return losses.detach(), plain, reduction.finish(), (loss.item(), gradient)


def close(actual, expected, atol=5e-5):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), atol=atol, rtol=0)


def test_the_example_of_the_docstring():
    losses, gradient, _, _ = evaluate(SRFT(entropy_level="token"))
    close(losses.flatten(), [-0.1379, 0.1044, -1.5])
    close(gradient.flatten(), [-1.7666, -0.1492, 1.0])


def test_the_parts_are_the_loss():
    for options in VARIANTS:
        if "entropy_coef" in options or options.get("variant"):
            continue
        _, _, metrics, (loss, _) = evaluate(SRFT(**options))
        parts = ("sft_demonstration", "rl_demonstration", "rl_positive", "rl_negative")
        assert sum(metrics[f"srft/{part}"] for part in parts) == pytest.approx(loss, rel=1e-12)


def test_entropy_is_a_mean_over_the_sample_or_the_update_or_nothing():
    logprobs, entropy = [[-0.2, -0.9], [-0.7, -0.1], [-0.6, -0.3]], [[0.1, 0.7], [0.4, 1.2], [0.0, 2.0]]
    means = {"token": [0.4, 1.2, 0.0, 2.0], "sequence": [0.8, 0.8, 1.0, 1.0], "batch": [0.9] * 4}
    for level, expected in means.items():
        _, gradient, metrics, _ = evaluate(SRFT(entropy_level=level), logprobs, entropy, rewards=(1.0, 1.0, 1.0))
        close(gradient[1:].flatten(), [-0.1 * math.exp(h) for h in expected], atol=1e-12)
        assert metrics["srft/weight_rl_max"] == pytest.approx(0.1 * math.exp(max(expected)))
        assert metrics["srft/entropy"] == pytest.approx((0.4 + 0.8 + 1.0) / 3)
        sft = [0.1, 0.7] if level == "token" else [0.4, 0.4]
        assert metrics["srft/weight_sft"] == pytest.approx(sum(0.5 * math.exp(-h) for h in sft) / 2)


def test_entropies_are_held_at_ten():
    _, gradient, metrics, _ = evaluate(SRFT(), entropy=[[0.1], [12.0], [1.2]])
    assert gradient[1].item() == pytest.approx(-0.1 * math.exp(10))
    assert metrics["srft/weight_rl"] == pytest.approx(0.1 * math.exp(10))


def test_the_supervised_term_is_a_mean_over_demonstrations_whatever_the_aggregation():
    plain = SRFT(sft_coef=None)
    for options in ({}, {"aggregation": "sum-over-Lmax", "max_response_length": 50}, {"aggregation": "seq-mean-token-mean"}):
        _, _, metrics, (_, gradient) = evaluate(
            SRFT(sft_coef=None, **options),
            [[-0.2, -0.9]] * 3,
            [[0.5, 0.5]] * 3,
            demonstration=(1, 1, 0),
            advantages=(0.0, 0.0, 0.0),
        )
        assert metrics["srft/sft_demonstration"] == pytest.approx(0.55), options
        close(gradient[:2].flatten(), [-0.25] * 4, atol=1e-12)
    assert plain.aggregation == "token-mean"


def test_the_ablations_are_weights_of_one():
    _, _, metrics, _ = evaluate(SRFT(sft_coef=None, rl_coef=None))
    assert (metrics["srft/weight_sft"], metrics["srft/weight_rl"]) == (1, 1)
    _, _, metrics, _ = evaluate(SRFT(sft_coef=0.25, rl_coef=0.2))
    assert metrics["srft/weight_sft"] == pytest.approx(0.25 * math.exp(-0.1))
    assert metrics["srft/weight_rl"] == pytest.approx(0.2 * math.exp(0.4))


def test_the_demonstration_is_shaped():
    def of_demonstration(objective):
        return evaluate(objective, advantages=(2.0, 0.5, 0.5))[1][0].item()

    p, sft = math.exp(-0.2), -3 * 0.5 * math.exp(-0.1)
    assert of_demonstration(SRFT()) == pytest.approx(sft - 2 * p)
    assert of_demonstration(SRFT(gamma=0.1)) == pytest.approx(sft - 2 * 0.1 * p / (p + 0.1) ** 2)


def test_rollouts_count_by_the_sign_of_their_reward():
    for rewards in ((1.0, 1.0, 0.0), (1.0, 1.0, -1.0), (1.0, 0.2, 0.0)):
        _, gradient, metrics, _ = evaluate(SRFT(), rewards=rewards, advantages=(0.0, 0.0, 0.0))
        close(gradient[1:].flatten(), [-0.1 * math.exp(0.4), 1.0], atol=1e-12)
    assert metrics["srft/rl_negative"] == pytest.approx(-0.5)


def test_an_update_without_demonstrations_has_their_terms_at_zero():
    losses, _, metrics, _ = evaluate(SRFT(), demonstration=(0, 0, 0))
    assert (metrics["srft/sft_demonstration"], metrics["srft/rl_demonstration"], metrics["srft/weight_sft"]) == (0, 0, 0)
    assert losses.isfinite().all()


def test_the_bonus_is_weighed_as_the_rollouts_are():
    (_, _, _, (without, _)), (_, _, _, (with_bonus, _)) = (evaluate(SRFT(entropy_coef=c)) for c in (0.0, 0.3))
    assert with_bonus == pytest.approx(without - 0.3 * (0.1 + 0.4 + 1.2) / 3)


def test_a_variant_is_what_null_options_become():
    canonical, hpt = SRFT(), SRFT(variant="hpt")
    assert (canonical.aggregation, canonical.max_response_length, canonical.entropy_gradient) == ("token-mean", None, False)
    assert (canonical.norm_by_std, canonical.gamma, canonical.entropy_coef) == (True, 0.0, 0.0)
    assert (hpt.aggregation, hpt.max_response_length, hpt.entropy_gradient) == ("sum-over-Lmax", 8192, True)
    assert (hpt.norm_by_std, hpt.gamma, hpt.entropy_coef) == (False, 0.1, 0.001)
    own = SRFT(variant="hpt", aggregation="token-mean", norm_by_std=True, gamma=0.0, entropy_coef=0.0)
    assert (own.aggregation, own.max_response_length, own.norm_by_std, own.gamma, own.entropy_coef) == (
        "token-mean",
        None,
        True,
        0,
        0,
    )
    assert canonical.advantages == AdvantageOptions(estimator="group", norm_by_std=True)
    assert hpt.advantages == AdvantageOptions(estimator="group", norm_by_std=False)


def test_it_counts_what_it_needs():
    assert (SRFT().needs, SRFT().totals_need, SRFT(entropy_level="batch").totals_need) == (set(), set(), {"entropy"})
    assert SRFT().trains_on == {"rollouts"}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("gamma", -0.1),
        ("sft_coef", -1.0),
        ("rl_coef", -1.0),
        ("entropy_coef", -0.1),
        ("variant", "released"),
        ("entropy_level", "word"),
    ],
)
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(Refused, match=option):
        build_objective({"name": "srft", option: value})
