"""What became of a claim, by a criterion that was fixed before there were results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from evidence.interval import Interval

Outcome = Literal["holds", "does not hold", "undecided"]


@dataclass(frozen=True)
class Verdict:
    """Of one claim."""

    outcome: Outcome
    decided_by: Mapping[str, Interval]  # the differences that the criterion is about
    beside: Mapping[str, Interval]  # what else one wants to know

    def to_json(self) -> dict[str, Any]:
        return {
            "outcome": self.outcome,
            **{key: {name: vars(one) for name, one in getattr(self, key).items()} for key in ("decided_by", "beside")},
        }


def all_above_zero(decided_by: Mapping[str, Interval], beside: Mapping[str, Interval]) -> Verdict:
    """Holds where all intervals lie above 0, does not where one lies below 0 (or all are exactly 0), else is undecided."""
    if all(one.low > 0 for one in decided_by.values()):
        return Verdict("holds", decided_by, beside)
    if any(one.high < 0 for one in decided_by.values()) or all(one.low == one.high == 0 for one in decided_by.values()):
        return Verdict("does not hold", decided_by, beside)
    return Verdict("undecided", decided_by, beside)
