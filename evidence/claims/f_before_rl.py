"""(f) What RL makes of either start."""

from __future__ import annotations

from evidence.claims.claim import Claim
from evidence.pictures import accuracies, curves
from evidence.results import Results, difference, final, mean
from evidence.sizes import Sizes
from evidence.verdict import Verdict, all_above_zero
from megapsft.report.figure import Figure

METHODS = {"SFT -> GRPO": "sft -> grpo", "PSFT -> GRPO": "psft -> grpo"}


def judge(results: Results, sizes: Sizes) -> Verdict:
    beside = {name: mean(results, method, final("in")) for name, method in {"SFT": "sft", "PSFT": "psft", **METHODS}.items()}
    beside["PSFT -> GRPO - SFT -> GRPO, out of domain"] = difference(results, "psft -> grpo", "sft -> grpo", final("out"))
    difference_in = difference(results, "psft -> grpo", "sft -> grpo", final("in"))
    return all_above_zero({"PSFT -> GRPO - SFT -> GRPO": difference_in}, beside)


def draw(results: Results, sizes: Sizes) -> list[Figure]:
    title = "Entropy on its own responses under GRPO"
    return [
        accuracies(results, METHODS, "in", name="f-in", title="Accuracy in the domain under GRPO, by where it starts"),
        accuracies(results, METHODS, "out", name="f-out", title="Accuracy out of the domain under GRPO, by where it starts"),
        curves(results, METHODS, "entropy", name="f-entropy", title=title, y_label="entropy (nats)"),
        curves(results, METHODS, "reward", name="f-reward", title="Reward under GRPO", y_label="mean reward (0 to 1)"),
    ]


CLAIM = Claim(
    letter="f",
    title="RL ends higher where it starts from PSFT than where it starts from SFT",
    source="PSFT (Zhu et al., ICLR 2026), Table 2",
    criterion="after the last step of GRPO the one that began with PSFT is right in the domain more often than the one with SFT",
    judge=judge,
    draw=draw,
)
