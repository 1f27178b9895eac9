"""What came of every method, as claims read it: finals by seed, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from evidence.interval import Interval, interval
from evidence.measured import Measured

LAST = 0.1  # of a curve: what "at the end" is a mean over


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one method."""

    samples: int  # that a run trains on
    rate: float  # learning rate
    trials: Mapping[float, Measured]  # by learning rate, with the first seed; empty where the rate is another method's
    runs: Mapping[int, Measured]  # by seed


Results = Mapping[str, Outcome]  # by the name of the method
Number = Callable[[Measured], float]  # of a run


def final(family: str) -> Number:
    """Accuracy after the last step: a share."""
    return lambda run: run.accuracy[family][-1]


def overall(run: Measured) -> float:
    """Mean of the final accuracies in and out of the domain."""
    return (run.accuracy["in"][-1] + run.accuracy["out"][-1]) / 2


def at_the_end(curve: str) -> Number:
    """Mean over the last tenth of the steps, one at least."""

    def number(run: Measured) -> float:
        values = run.curves[curve]
        last = values[-max(1, math.ceil(LAST * len(values))) :]
        return sum(last) / len(last)

    return number


def mean_of(curve: str) -> Number:
    """Mean over all steps."""
    return lambda run: sum(run.curves[curve]) / len(run.curves[curve])


def values(results: Results, method: str, number: Number) -> dict[int, float]:
    """By seed."""
    return {seed: number(run) for seed, run in results[method].runs.items()}


def mean(results: Results, method: str, number: Number) -> Interval:
    """Over seeds."""
    return interval(values(results, method, number).values())


def difference(results: Results, one: str, other: str, number: Number) -> Interval:
    """The number of one method less that of the other, paired by seed: they start from the same model, and draw the same rows."""
    ours, theirs = values(results, one, number), values(results, other, number)
    return interval(ours[seed] - theirs[seed] for seed in ours)


def from_json(tree: Mapping[str, Any]) -> Results:
    """As `to_json` wrote them; JSON has turned numbers that are keys to text."""
    return {
        name: Outcome(
            samples=one["samples"],
            rate=one["rate"],
            trials={float(rate): Measured(**run) for rate, run in one["trials"].items()},
            runs={int(seed): Measured(**run) for seed, run in one["runs"].items()},
        )
        for name, one in tree.items()
    }


def to_json(results: Results) -> dict[str, Any]:
    return {
        name: vars(one) | {key: {which: vars(run) for which, run in getattr(one, key).items()} for key in ("trials", "runs")}
        for name, one in results.items()
    }
