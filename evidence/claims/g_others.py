"""(g) Other objectives on the same demonstrations."""

from __future__ import annotations

from evidence.claims.claim import Claim
from evidence.pictures import curves, in_and_out
from evidence.results import Results, difference, final, mean, overall
from evidence.sizes import Sizes
from evidence.verdict import Verdict, all_above_zero
from megapsft.report.figure import Figure

OTHERS = {"DFT": "dft", "iw-SFT": "iw_sft", "GEM": "gem"}
METHODS = {"SFT": "sft", "PSFT": "psft"} | OTHERS


def judge(results: Results, sizes: Sizes) -> Verdict:
    decided_by = {f"PSFT - {name}": difference(results, "psft", method, overall) for name, method in OTHERS.items()}
    named = (("in-domain", "in"), ("out of domain", "out"))
    beside = {f"{name}, {where}": mean(results, m, final(family)) for name, m in METHODS.items() for where, family in named}
    return all_above_zero(decided_by, beside)


def draw(results: Results, sizes: Sizes) -> list[Figure]:
    title = "Entropy on the demonstrations, by objective"
    return [
        in_and_out(results, METHODS, name="g-accuracy", title="Accuracy after the last step, by objective"),
        curves(results, METHODS, "entropy", name="g-entropy", title=title, y_label="entropy (nats)"),
    ]


CLAIM = Claim(
    letter="g",
    title="PSFT does better than DFT, iw-SFT and GEM",
    source="PSFT (Zhu et al., ICLR 2026), Appendix C.4 and Figure 12, of DFT and iw-SFT; GEM is beside them here",
    criterion="after the last step the mean of its accuracies in and out of the domain is above that of each of the three",
    judge=judge,
    draw=draw,
)
