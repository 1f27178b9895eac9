"""Chosen against rejected responses."""

from __future__ import annotations

from megapsft.report.folders import Shown
from megapsft.report.lines import Curve
from megapsft.report.section import Section, of_curves

CURVES = (
    Curve(
        name="dpo-rewards", title="Rewards of both sides", unit="nats, times beta",
        keys={"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
        note="beta * (log-probability - that of the reference), summed over the response; a mean over pairs.",
    ),
    Curve(
        name="dpo-margin", title="Margin", unit="nats, times beta", keys={"rewards/margins": ""},
        note="Reward of the chosen side less that of the rejected one.",
    ),
    Curve(
        name="dpo-accuracy", title="Pairs that are told apart", unit="share of pairs", keys={"rewards/accuracies": ""},
        note="Pairs whose chosen side has the larger reward.",
    ),
    Curve(
        name="dpo-logps", title="Log-probability of responses", unit="nats a response",
        keys={"logps/chosen": "chosen", "logps/rejected": "rejected"},
    ),
)  # fmt: skip


def section(shown: Shown) -> Section | None:
    return of_curves("Preferences", CURVES, shown.runs)


__all__ = ["CURVES", "section"]
