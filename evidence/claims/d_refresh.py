"""(d) How often the old policy is refreshed."""

from __future__ import annotations

from evidence.claims.claim import Claim
from evidence.methods import FIXED, REFRESHES, psft_refreshed, updates_of_a_step
from evidence.pictures import curves, in_and_out
from evidence.results import Results, at_the_end, difference, final, mean
from evidence.sizes import Sizes
from evidence.verdict import Verdict, all_above_zero
from megapsft.report.figure import Figure


def methods(sizes: Sizes) -> dict[str, str]:
    """Updates of one old policy -> name of the method."""
    found = {updates: psft_refreshed(updates, sizes) for updates in sorted({*REFRESHES, updates_of_a_step(sizes)})}
    return {f"after {updates}": name for updates, name in found.items()} | {"never": FIXED}


def judge(results: Results, sizes: Sizes) -> Verdict:
    shown = methods(sizes)
    beside = {f"in-domain, refreshed {when}": mean(results, name, final("in")) for when, name in shown.items()}
    beside |= {f"entropy at the end, refreshed {when}": mean(results, n, at_the_end("entropy")) for when, n in shown.items()}
    return all_above_zero({"each step - never": difference(results, "psft", FIXED, final("in"))}, beside)


def draw(results: Results, sizes: Sizes) -> list[Figure]:
    title, shown = "Entropy of PSFT by the updates after which its old policy is refreshed", methods(sizes)
    return [
        curves(results, shown, "entropy", name="d-entropy", title=title, y_label="entropy (nats)"),
        in_and_out(results, shown, name="d-accuracy", title="Accuracy of PSFT by the updates after which it is refreshed"),
    ]


CLAIM = Claim(
    letter="d",
    title="An old policy that is never refreshed holds back what PSFT can learn",
    source="PSFT (Zhu et al., ICLR 2026), Section 3 (dynamic update of the old policy) and Figure 9",
    criterion="after the last step PSFT is right in the domain more often with a refresh each step than with a fixed reference",
    judge=judge,
    draw=draw,
)
