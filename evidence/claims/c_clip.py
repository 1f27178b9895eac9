"""(c) The clip."""

from __future__ import annotations

import math

from evidence.claims.claim import Claim
from evidence.methods import CLIPS, psft_with_clip
from evidence.pictures import bars, curves, in_and_out
from evidence.results import Results, at_the_end, difference, final, mean, mean_of
from evidence.sizes import Sizes
from evidence.verdict import Verdict, all_above_zero
from megapsft.report.figure import Figure

METHODS = {name: psft_with_clip(name) for name in CLIPS}


def judge(results: Results, sizes: Sizes) -> Verdict:
    norm, entropy = mean_of("gradient_norm"), at_the_end("entropy")
    differences = {"no clip - 0.28": difference(results, METHODS["none"], "psft", lambda run: math.log(norm(run)))}
    beside = {f"entropy at the end, clip {name}": mean(results, method, entropy) for name, method in METHODS.items()}
    return all_above_zero(
        differences, beside | {f"in-domain, clip {n}": mean(results, m, final("in")) for n, m in METHODS.items()}
    )


def draw(results: Results, sizes: Sizes) -> list[Figure]:
    title, unit = "Entropy of PSFT by its clip", "entropy (nats)"
    norms = "gradient norm, mean over all steps"
    return [
        curves(results, METHODS, "entropy", name="c-entropy", title=title, y_label=unit),
        curves(results, METHODS, "clip_fraction", name="c-clipped", title="Tokens that are clipped", y_label="share of tokens"),
        bars(results, METHODS, mean_of("gradient_norm"), name="c-norm", title="Gradient of PSFT by its clip", y_label=norms),
        in_and_out(results, METHODS, name="c-accuracy", title="Accuracy of PSFT by its clip"),
    ]


CLAIM = Claim(
    letter="c",
    title="Without its clip PSFT has larger gradients",
    source="PSFT (Zhu et al., arXiv 2025), Section 5.2; ICLR 2026, Figure 13",
    criterion="the logarithm of the gradient norm, a mean over all steps, is larger without a clip than with one of 0.28",
    judge=judge,
    draw=draw,
)
