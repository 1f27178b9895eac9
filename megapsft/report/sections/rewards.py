"""What a policy that samples its own responses earns, and what they are like."""

from __future__ import annotations

from megapsft.report.folders import Shown
from megapsft.report.lines import Curve
from megapsft.report.section import Section, of_curves

COUNTED = ("reward/mean", "reward/max", "reward/min", "reward/timeouts", "reward/deaths", "reward/errors")
CURVES = (
    Curve(
        name="reward", title="Reward", unit="reward", of="steps", keys={"reward/mean": ""},
        note="Mean over the samples that are trained, all rewards together with their weights.",
    ),
    Curve(
        name="response-length", title="Length of responses", unit="tokens", of="steps",
        keys={"rollout/length": "mean", "rollout/length_max": "longest"},
    ),
    Curve(
        name="unfinished", title="Responses that were cut", unit="share of responses", of="steps",
        keys={"rollout/unfinished": ""}, note="At rollout.max_tokens.",
    ),
    Curve(
        name="equal-groups", title="Groups with equal rewards", unit="share of groups", of="steps",
        keys={"rollout/equal_groups": ""}, note="They have no advantages, and teach nothing.",
    ),
    Curve(
        name="engine-mismatch", title="Engine against trainer", unit="nats a token", of="steps", log_y=True,
        keys={"rollout/mismatch_k3": ""},
        note="KL divergence of what sampled from what is trained, before the step (k3 estimate).",
    ),
    Curve(
        name="weight-lag", title="Age of the weights that sampled", unit="steps", of="steps",
        keys={"rollout/weight_lag": "mean", "rollout/weight_lag_max": "largest"},
    ),
)  # fmt: skip


def section(shown: Shown) -> Section | None:
    kinds = dict.fromkeys(key for run in shown.runs for record in run.steps for key in record if key.startswith("reward/"))
    parts = [
        Curve(
            name=f"reward-{number}", title=f"Reward: {key.removeprefix('reward/')}", unit="reward", of="steps", keys={key: ""},
            note="Before its weight.",
        )
        for number, key in enumerate(key for key in kinds if key not in COUNTED)
    ]  # fmt: skip
    return of_curves("Rewards and responses", (CURVES[0], *parts, *CURVES[1:]), shown.runs)


__all__ = ["CURVES", "section"]
