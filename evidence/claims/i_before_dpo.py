"""(i) What preferences make of either start."""

from __future__ import annotations

from evidence.claims.claim import Claim
from evidence.pictures import curves, in_and_out
from evidence.results import Results, at_the_end, difference, final, mean
from evidence.sizes import Sizes
from evidence.verdict import Verdict, all_above_zero
from megapsft.report.figure import Figure

METHODS = {"SFT -> DPO": "sft -> dpo", "PSFT -> DPO": "psft -> dpo"}


def judge(results: Results, sizes: Sizes) -> Verdict:
    beside = {name: mean(results, method, final("in")) for name, method in {"SFT": "sft", "PSFT": "psft", **METHODS}.items()}
    beside["PSFT -> DPO - SFT -> DPO, margin at the end"] = difference(results, "psft -> dpo", "sft -> dpo", at_the_end("margin"))
    beside["PSFT -> DPO - SFT -> DPO, out of domain"] = difference(results, "psft -> dpo", "sft -> dpo", final("out"))
    return all_above_zero({"PSFT -> DPO - SFT -> DPO": difference(results, "psft -> dpo", "sft -> dpo", final("in"))}, beside)


def draw(results: Results, sizes: Sizes) -> list[Figure]:
    shown = {"SFT": "sft", "PSFT": "psft"} | METHODS
    title, unit = "Reward of the right solution less that of the wrong one, under DPO", "margin (nats, times beta)"
    return [
        in_and_out(results, shown, name="i-accuracy", title="Accuracy before and after DPO"),
        curves(results, METHODS, "margin", name="i-margin", title=title, y_label=unit),
    ]


CLAIM = Claim(
    letter="i",
    title="DPO ends higher where it starts from PSFT than where it starts from SFT",
    source="PSFT (Zhu et al., ICLR 2026), Table 3 and Finding 1 of Section 4.3",
    criterion="after the last step of DPO the one that began with PSFT is right in the domain more often than the one with SFT",
    judge=judge,
    draw=draw,
)
