"""(a) Entropy under prolonged fine-tuning."""

from __future__ import annotations

from evidence.claims.claim import Claim
from evidence.pictures import curves
from evidence.results import Results, at_the_end, difference, mean
from evidence.sizes import Sizes
from evidence.verdict import Verdict, all_above_zero
from megapsft.report.figure import Figure

METHODS = {"SFT": "sft", "SFT-KL": "sft_kl", "PSFT": "psft"}


def judge(results: Results, sizes: Sizes) -> Verdict:
    entropy = at_the_end("entropy")
    return all_above_zero(
        {f"PSFT - {name}": difference(results, "psft", METHODS[name], entropy) for name in ("SFT", "SFT-KL")},
        {name: mean(results, method, entropy) for name, method in METHODS.items()},
    )


def draw(results: Results, sizes: Sizes) -> list[Figure]:
    title = "Entropy on the demonstrations while they are trained on"
    return [curves(results, METHODS, "entropy", name="a-entropy", title=title, y_label="entropy (nats)")]


CLAIM = Claim(
    letter="a",
    title="PSFT keeps the entropy that prolonged SFT loses, with a KL or without",
    source="PSFT (Zhu et al., ICLR 2026), Figure 1 and Finding 1 of Section 4.1",
    criterion="in the last tenth of the steps the entropy of PSFT is above that of SFT, and above that of SFT-KL",
    judge=judge,
    draw=draw,
)
