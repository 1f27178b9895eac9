"""Adapters have the loss and the gradient of one rank on every kind of split. All of `SPLITS` held when this was written."""

from __future__ import annotations

import pytest

from tests.invariants.compare import Comparison
from tests.invariants.splits import split

OPTIONS = ("lora.rank=4", "lora.alpha=8")
CASES = [
    ("dense", split("recompute mlp, layernorm", pack=256, recompute="selective", modules="[mlp,layernorm]")),
    ("dense", split("tp2", 2, pack=256, tp=2)),
    ("dense", split("tp2+sp recompute full", 2, pack=256, tp=2, sp=True, recompute="full")),
    ("dense", split("pp2+vpp2", 2, pack=256, pp=2, vpp=2)),
    ("dense", split("cp2", 2, pack=256, cp=2)),
    ("dense", split("dp2+zero1+overlap", 2, pack=256, zero1=True, overlap=True, gather=True)),
    ("moe", split("tp2+sp", 2, pack=256, tp=2, sp=True)),
    ("moe", split("tp2+ep2+etp1+zero1", 2, pack=256, tp=2, ep=2, etp=1, zero1=True)),
]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return Comparison(tmp_path_factory.mktemp("invariants"), OPTIONS, samples=8)


@pytest.mark.parametrize(("kind", "case"), CASES, ids=[f"{kind}-{case.name}" for kind, case in CASES])
def test_same_loss_and_gradient_of_adapters_as_on_one_rank(kind, case, comparison):
    for row in comparison.rows(kind, case):
        assert row.passed, row
