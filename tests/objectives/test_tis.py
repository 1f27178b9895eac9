"""Truncated importance sampling under a surrogate. More values: tests/oracles; every objective with it: test_contract.py."""

import math

import pytest
import torch

from megapsft.config import load_config
from megapsft.objectives.grpo import GRPO
from megapsft.objectives.registry import build_objective
from tests.objectives.on_rollouts import LOGPROBS, OLD_LOGPROBS, close, evaluate
from tests.oracles.batches import microbatch

ROLLOUT = [-0.45, -0.7, -2.6]  # old - rollout: 0.1, -0.3, 2.0
NUMBERS = (LOGPROBS, OLD_LOGPROBS, 0.5)


def test_each_token_has_its_weight():
    losses, gradient, metrics, _ = evaluate(GRPO(tis="token"), *NUMBERS, rollout_logprobs=ROLLOUT)
    plain = evaluate(GRPO(), *NUMBERS)
    weights = torch.tensor([[math.exp(0.1), math.exp(-0.3), 2.0]])
    torch.testing.assert_close(losses, weights * plain[0])
    torch.testing.assert_close(gradient, weights * plain[1])
    torch.testing.assert_close(metrics["tis/weight_mean"], weights)
    assert metrics["tis/clip_fraction"].tolist() == [[0, 0, 1]]
    for key, value in plain[2].items():
        assert torch.equal(metrics[key], value)


def test_or_all_that_of_their_sample():
    old_logprobs, rollout = [OLD_LOGPROBS, OLD_LOGPROBS], [ROLLOUT, OLD_LOGPROBS]
    objective = GRPO(tis="sequence", tis_cap=7.0)
    _, _, metrics, _ = evaluate(objective, [LOGPROBS, LOGPROBS], old_logprobs, 0.5, rollout_logprobs=rollout)
    close(metrics["tis/weight_mean"], [[math.exp(1.8)] * 3, [1.0] * 3])


def test_the_cap_is_an_option():
    for cap, clipped in ((1.05, [1, 0, 1]), (9.0, [0, 0, 0])):
        _, _, metrics, _ = evaluate(GRPO(tis="token", tis_cap=cap), *NUMBERS, rollout_logprobs=ROLLOUT)
        assert metrics["tis/clip_fraction"].tolist() == [clipped]
        assert metrics["tis/weight_max"].max().item() == pytest.approx(min(cap, math.exp(2.0)))


def test_the_kl_is_not_weighted():
    fields = {"rollout_logprobs": ROLLOUT, "ref_logprobs": [-0.5, -0.9, -0.4]}
    with_kl = evaluate(GRPO(tis="token", kl_coef=0.1), *NUMBERS, **fields)
    without = evaluate(GRPO(tis="token"), *NUMBERS, **fields)
    torch.testing.assert_close(with_kl[0] - without[0], 0.1 * with_kl[2]["objective/kl"])


def test_normalised_by_their_mean_over_the_update():
    objective = GRPO(tis="token", tis_batch_normalize=True)
    assert objective.totals_need == {"old_logprobs", "rollout_logprobs"}
    assert GRPO(tis="token").totals_need is None
    fields = {"old_logprobs": torch.tensor([OLD_LOGPROBS]), "rollout_logprobs": torch.tensor([ROLLOUT])}
    mask = torch.tensor([[True, True, False]])
    totals = objective.totals(microbatch(mask, mask / 2, **fields))
    assert totals["trained"] == 2
    assert totals["weights"].item() == pytest.approx(math.exp(0.1) + math.exp(-0.3))
    _, _, metrics, _ = evaluate(objective, *NUMBERS, rollout_logprobs=ROLLOUT)
    weights = torch.tensor([[math.exp(0.1), math.exp(-0.3), 2.0]])
    torch.testing.assert_close(metrics["tis/weight_mean"], weights / weights.mean())


def test_how_far_apart_the_engines_are():
    _, _, metrics, _ = evaluate(GRPO(tis="token"), *NUMBERS, rollout_logprobs=ROLLOUT)
    close(metrics["tis/mismatch_kl"], [-0.1, 0.3, -2.0])
    close(metrics["tis/mismatch_k3"], [math.expm1(0.1) - 0.1, math.expm1(-0.3) + 0.3, math.expm1(2.0) - 2.0])


@pytest.mark.parametrize(("rollout", "weight"), [(-200.0, 1e9), (0.0, math.exp(-20))])
def test_what_the_other_engine_took_for_impossible_stays_finite(rollout, weight):
    old = -100.0
    objective = GRPO(tis="token", tis_cap=1e9)
    losses, _, metrics, _ = evaluate(objective, [old], [old], 1.0, rollout_logprobs=[rollout])
    torch.testing.assert_close(losses, torch.tensor([[-min(weight, math.exp(20))]]))
    assert all(value.isfinite().all() for value in metrics.values())


def test_asks_for_what_the_engine_recorded():
    assert GRPO(tis="token").needs == {"old_logprobs", "rollout_logprobs"}
    assert "tis/weight_mean" not in GRPO().metrics


@pytest.mark.parametrize("written", ["off", "'off'", "false"])
def test_off_is_off_however_yaml_reads_it(written):
    section = load_config(None, ["objective.name=grpo", f"objective.tis={written}"]).objective
    assert build_objective(section) == GRPO()
    assert build_objective(section).tis == "off"
