"""Every row of `python -m tests.invariants`, and that PSFT at its own old policy is SFT to the last bit."""

from __future__ import annotations

import pytest
import torch

from tests.invariants.compare import Comparison
from tests.invariants.splits import SPLITS, split

CASES = [(kind, case) for kind in ("dense", "moe") for case in SPLITS if kind in case.kinds]
AT_OLD_POLICY = [
    split("1 rank", pack=256),
    split("unpacked", packing=False, mbs=2),
    split("recompute full", pack=256, recompute="full"),
    split("tp2+cp2+sp", 4, pack=256, tp=2, cp=2, sp=True),
    split("pp2+vpp2", 2, pack=256, pp=2, vpp=2),
]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return Comparison(tmp_path_factory.mktemp("invariants"))


@pytest.mark.parametrize(("kind", "case"), CASES, ids=[f"{kind}-{case.name}" for kind, case in CASES])
def test_same_loss_and_gradient_as_on_one_rank(kind, case, comparison):
    for row in comparison.rows(kind, case):
        assert row.passed, row


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("case", AT_OLD_POLICY, ids=lambda case: case.name)
def test_psft_at_its_old_policy_is_sft_bitwise(kind, case, comparison):
    """The old-policy pass has the bits of the training pass, so every ratio is 1 and the gradient is SFT's."""
    results = comparison.at_old_policy(kind, case)
    metrics = results["psft"]["metrics"]
    assert metrics["objective/ratio_max"] == metrics["objective/ratio_min"] == 1.0
    assert metrics["train/loss"] == pytest.approx(-1.0, rel=1e-6)
    for name, gradient in results["sft"]["gradient"].items():
        assert torch.equal(gradient, results["psft"]["gradient"][name]), name


def test_a_wrong_gradient_is_found(comparison):
    """The comparison itself can fail: with half of the samples lost nothing agrees."""
    lost = comparison.rows("dense", split("fewer samples", mbs=1, packing=False), samples=8)[0]
    assert not lost.passed
