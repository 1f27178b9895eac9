"""Confidence intervals of a mean over few seeds, by Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from megapsft.errors import Refused

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # of 1, 2, ... degrees of freedom


@dataclass(frozen=True)
class Interval:
    """mean ± half holds the true mean with 95 % confidence, where the values are independent and normal."""

    mean: float
    half: float
    count: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half:.3f}"


def interval(values: Iterable[float]) -> Interval:
    """Of a mean of two to ten values: half = t s / sqrt(n), s with n - 1 in its denominator.

    Raises:
        Refused: fewer values, or more.

    Example:
        1, 2, 3 -> 2 ± 2.484
    """
    known = list(values)
    if not 2 <= len(known) <= len(T_975) + 1:
        raise Refused(f"{len(known)} seeds", f"must be from 2 to {len(T_975) + 1}", "use 3")
    half = T_975[len(known) - 2] * statistics.stdev(known) / math.sqrt(len(known))
    return Interval(statistics.fmean(known), half, len(known))
