"""Before anything is learned: would noise alone be clipped? Measured on the first update's samples by the run's own passes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megapsft.errors import Refused
from megapsft.output.whole import write_whole
from megapsft.policy.build import Policy
from megapsft.train.noise import Bench, Floor
from megapsft.train.plan import RunPlan
from megapsft.types import Group

FILE = "noise.json"


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the training pass and the old pass differ by with the same weights, and what of that is allowed."""

    floor: Floor
    count: int
    unit: str
    clip_range: tuple[float | None, float | None]
    limit: float

    @property
    def accepted(self) -> bool:
        return self.floor.clipped <= self.limit

    def __str__(self) -> str:
        low, high = self.clip_range
        bounds = f"{0 if low is None else 1 - low:g} to {'inf' if high is None else f'{1 + high:g}'}"
        share = f"{100 * self.floor.clipped:.3g} % of {self.count:,} {self.unit} have a ratio outside {bounds}"
        return f"with the same weights in both passes {share}"

    def refuse(self) -> None:
        """
        Raises:
            Refused: noise clips more than is allowed.
        """
        if not self.accepted:
            rule = f"is exceeded before anything is learned: {self}"
            remedy = "`megapsft probe` names the cause; train.max_noise_clipped=1 trains all the same"
            raise Refused(f"train.max_noise_clipped={self.limit:g}", rule, remedy)

    def write(self, folder: Path) -> None:
        """`noise.json` in the folder of the run; quantiles and the largest are of |ratio - 1|."""
        low, high = self.clip_range
        content = {
            "clipped": self.floor.clipped,
            "limit": self.limit,
            "accepted": self.accepted,
            "unit": self.unit,
            "count": self.count,
            "clip_low": low,
            "clip_high": high,
            "differ": self.floor.differ,
            "mean_abs_log_ratio": self.floor.mean,
            "quantiles": {str(q): value for q, value in self.floor.quantiles.items()},
            "max": self.floor.largest,
        }
        write_whole(folder / FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")


def gather_evidence(policy: Policy, plan: RunPlan, groups: Sequence[Group], limit: float) -> Evidence | None:
    """Collective. Of the groups of one update; None where no token of them is trained. Weights stay as they are."""
    if not any(sample.loss_mask[1:].any() for group in groups for sample in group):
        return None
    bench, clip_range = Bench(groups, plan), plan.phases[-1].objective.clip_range
    bench.warm(policy, plan)
    row = bench.measure(policy, plan, kind="configured", title="as configured")
    floor = Floor.of(row.log_ratios, clip_range)
    return Evidence(floor=floor, count=len(row.log_ratios), unit=bench.unit, clip_range=clip_range, limit=limit)


__all__ = ["FILE", "Evidence", "gather_evidence"]
