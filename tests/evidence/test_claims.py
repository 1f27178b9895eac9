"""Every criterion on results made by hand that make it hold, fail, and neither."""

import json

import pytest

from evidence.claims import CLAIMS
from evidence.verdict import all_above_zero
from tests.evidence.made import SIZES, made

BETTER = {  # claim -> (method, curve or family, sign): what has to be larger, or smaller, for it to hold
    "a": ("psft", "entropy", 1),
    "b": ("psft", "out", 1),
    "c": ("psft, clip none", "gradient_norm", 1),
    "d": ("psft, fixed reference", "in", -1),
    "e": (f"psft, warm-up {SIZES.steps // 2}", "in", 1),
    "f": ("psft -> grpo", "in", 1),
    "g": ("psft", "out", 1),
    "h": ("srft", "in", 1),
    "i": ("psft -> dpo", "in", 1),
}
SHIFTS = {"holds": (0.2, 0.2, 0.2), "does not hold": (-0.2, -0.2, -0.2), "undecided": (0.2, -0.2, 0.05)}


def test_all_claims_of_the_issue_are_there():
    assert [claim.letter for claim in CLAIMS] == list("abcdefghi") == list(BETTER)


@pytest.mark.parametrize("outcome", SHIFTS)
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.letter)
def test_verdicts(claim, outcome):
    method, what, sign = BETTER[claim.letter]
    verdict = claim.judge(made({(method, what): [sign * shift for shift in SHIFTS[outcome]]}), SIZES)
    assert verdict.outcome == outcome
    json.dumps(verdict.to_json(), allow_nan=False)
    if outcome == "holds" and claim.letter not in "cg":  # a logarithm, and a mean of two families
        for interval in verdict.decided_by.values():
            assert interval.mean == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.letter)
def test_methods_that_are_the_same_decide_nothing(claim):
    assert claim.judge(made(), SIZES).outcome == "undecided"


def test_one_difference_of_several_is_enough_to_fail():
    of = {claim.letter: claim for claim in CLAIMS}
    shifts = {("psft", "entropy"): SHIFTS["holds"], ("sft_kl", "entropy"): (0.5, 0.5, 0.5)}
    assert of["a"].judge(made(shifts), SIZES).outcome == "does not hold"
    shifts = {("psft", "out"): SHIFTS["holds"], ("gem", "out"): (0.2, 0.2, 0.2)}
    assert of["g"].judge(made(shifts), SIZES).outcome == "undecided"


def test_exactly_nothing_does_not_hold():
    claim = CLAIMS[1]
    same = made()
    same = {**same, "psft": same["sft"]}
    verdict = claim.judge(same, SIZES)
    assert verdict.decided_by["PSFT - SFT"].mean == 0
    assert verdict.outcome == all_above_zero(verdict.decided_by, {}).outcome == "does not hold"
