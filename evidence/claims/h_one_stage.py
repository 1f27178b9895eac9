"""(h) One stage or two."""

from __future__ import annotations

from evidence.claims.claim import Claim
from evidence.pictures import accuracies, curves, in_and_out
from evidence.results import Results, difference, final, mean
from evidence.sizes import Sizes
from evidence.verdict import Verdict, all_above_zero
from megapsft.report.figure import Figure

METHODS = {"SFT -> GRPO": "sft -> grpo", "SRFT": "srft"}


def judge(results: Results, sizes: Sizes) -> Verdict:
    beside = {name: mean(results, method, final("in")) for name, method in METHODS.items()}
    beside["SRFT - SFT -> GRPO, out of domain"] = difference(results, "srft", "sft -> grpo", final("out"))
    return all_above_zero({"SRFT - SFT -> GRPO": difference(results, "srft", "sft -> grpo", final("in"))}, beside)


def draw(results: Results, sizes: Sizes) -> list[Figure]:
    one = {"SRFT": "srft"}
    return [
        in_and_out(results, METHODS, name="h-accuracy", title="Accuracy after as many samples"),
        accuracies(results, one, "in", name="h-in", title="Accuracy of SRFT in the domain"),
        curves(results, one, "entropy", name="h-entropy", title="Entropy under SRFT", y_label="entropy (nats)"),
    ]


CLAIM = Claim(
    letter="h",
    title="One stage of SRFT does better than SFT and then RL",
    source="SRFT (Fu et al., 2025), Section 3.2.2 and Table 1",
    criterion="after as many demonstrations and responses together SRFT is right in the domain more often than SFT -> GRPO",
    judge=judge,
    draw=draw,
)
