"""(e) Warm-up by SFT."""

from __future__ import annotations

from evidence.claims.claim import Claim
from evidence.methods import psft_warmed_up, warm_ups
from evidence.pictures import curves, in_and_out
from evidence.results import Results, at_the_end, difference, final, mean
from evidence.sizes import Sizes
from evidence.verdict import Verdict, all_above_zero
from megapsft.report.figure import Figure


def methods(sizes: Sizes) -> dict[str, str]:
    """Steps of the warm-up -> name of the method."""
    return {f"{steps} steps": psft_warmed_up(steps) for steps in warm_ups(sizes)}


def judge(results: Results, sizes: Sizes) -> Verdict:
    shown = methods(sizes)
    longest = list(shown.values())[-1]
    decided_by = {f"longest warm-up - {name}": difference(results, longest, method, final("in"))
                  for name, method in (("none", "psft"), ("SFT", "sft"))}  # fmt: skip
    beside = {f"in-domain, {name}": mean(results, method, final("in")) for name, method in shown.items()}
    beside |= {f"entropy at the end, {name}": mean(results, m, at_the_end("entropy")) for name, m in shown.items()}
    return all_above_zero(decided_by, beside)


def draw(results: Results, sizes: Sizes) -> list[Figure]:
    shown, title = methods(sizes), "Entropy of PSFT by the length of its warm-up"
    return [
        curves(results, shown, "entropy", name="e-entropy", title=title, y_label="entropy (nats)"),
        in_and_out(results, shown, name="e-accuracy", title="Accuracy of PSFT by the length of its warm-up"),
    ]


CLAIM = Claim(
    letter="e",
    title="PSFT behind a warm-up surpasses both PSFT without one and SFT in the domain",
    source="PSFT (Zhu et al., ICLR 2026), Figure 2a and Finding 3 of Section 4.1",
    criterion="after the last step PSFT with the longest warm-up, half of all steps, is right in the domain more often than PSFT "
    "without one, and more often than SFT",
    judge=judge,
    draw=draw,
)
