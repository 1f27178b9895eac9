"""What is minimised, and what that does to the policy."""

from __future__ import annotations

from megapsft.report.curves import CLIP_FRACTION, ENTROPY, GRAD_NORM, LEARNING_RATE, NLL
from megapsft.report.folders import Shown
from megapsft.report.lines import Curve
from megapsft.report.section import Section, of_curves

LOSS = Curve(
    name="loss", title="Loss", unit="of the objective", keys={"train/loss": ""},
    note="What each run minimises: of different objectives it cannot be compared.",
)  # fmt: skip
RATIO = Curve(
    name="ratio", title="Ratio to the old policy", unit="ratio", log_y=True,
    keys={"objective/ratio_mean": ""}, band=("objective/ratio_min", "objective/ratio_max"),
    note="exp(log-probability - old log-probability) of trained tokens: the mean, and from the smallest to the largest; 1 where "
    "there is no old policy.",
)  # fmt: skip
RATIO_QUANTILES = Curve(
    name="log-ratio", title="Log-ratio to the old policy: quantiles", unit="nats", keys={"objective/log_ratio_p50": ""},
    band=("objective/log_ratio_p01", "objective/log_ratio_p99"),
    note="Log-probability - old log-probability of trained tokens: the median, and from the 1 % to the 99 % quantile.",
)  # fmt: skip
STEP_KL = Curve(
    name="step-kl", title="KL within a step", unit="nats a token", keys={"objective/ppo_kl": ""},
    note="From the policy at the start of the step: the k1 estimate on trained tokens, which may be negative.",
)  # fmt: skip
REFERENCE_KL = Curve(
    name="reference-kl", title="KL to the reference", unit="nats a token", keys={"objective/kl": ""},
    note="Exact or estimated, as the objective says (docs/objectives.md).",
)  # fmt: skip
CURVES = (NLL, LOSS, ENTROPY, CLIP_FRACTION, RATIO, RATIO_QUANTILES, STEP_KL, REFERENCE_KL, GRAD_NORM, LEARNING_RATE)


def section(shown: Shown) -> Section | None:
    return of_curves("Training", CURVES, shown.runs)


__all__ = ["CURVES", "section"]
