"""(b) What is kept of what was not trained."""

from __future__ import annotations

from evidence.claims.a_entropy import METHODS
from evidence.claims.claim import Claim
from evidence.pictures import accuracies
from evidence.results import Results, difference, final, mean
from evidence.sizes import Sizes
from evidence.verdict import Verdict, all_above_zero
from megapsft.report.figure import Figure


def judge(results: Results, sizes: Sizes) -> Verdict:
    beside = {
        f"{name}, out of domain": mean(results, method, final("out")) for name, method in {"base": "base", **METHODS}.items()
    }
    beside["PSFT - SFT, in-domain"] = difference(results, "psft", "sft", final("in"))
    return all_above_zero({"PSFT - SFT": difference(results, "psft", "sft", final("out"))}, beside)


def draw(results: Results, sizes: Sizes) -> list[Figure]:
    named = (("out", "Accuracy on the family that is not trained"), ("in", "Accuracy on the family that is trained"))
    return [accuracies(results, METHODS, family, name=f"b-{family}", title=title) for family, title in named]


CLAIM = Claim(
    letter="b",
    title="PSFT generalises better out of the domain than SFT",
    source="PSFT (Zhu et al., ICLR 2026), Table 1 and Finding 2 of Section 4.2",
    criterion="after the last step PSFT is right out of the domain more often than SFT",
    judge=judge,
    draw=draw,
)
