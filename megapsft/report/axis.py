"""Numbers on an axis: where they lie, which of them are written, and which points of a long line are drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MOST = 600  # points of a line that are drawn


@dataclass(frozen=True)
class Axis:
    """From numbers to 0 (its low end) ... 1 (its high end)."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """nan where the axis has no place for it."""
        if not self.log:
            return (value - self.low) / (self.high - self.low)
        return math.log(value / self.low) / math.log(self.high / self.low) if value > 0 else math.nan

    @property
    def ticks(self) -> list[float]:
        """Three to seven round numbers."""
        return _log_ticks(self.low, self.high) if self.log else _ticks(self.low, self.high)


def axis_of(values: Iterable[float], *, log: bool = False, tight: bool = False) -> Axis:
    """The axis that holds all finite values; with a little room beyond them unless it is tight.

    Where nothing is above 0 a logarithmic axis is none, as it has no place for anything.
    """
    known = [value for value in values if math.isfinite(value)]
    if log and (above := [value for value in known if value > 0]):
        low, high = min(above), max(above)
        room = 1.0 if tight and high > low else max((high / low) ** 0.05, 1.1)
        return Axis(low / room, high * room, log=True)
    low, high = min(known, default=0.0), max(known, default=1.0)
    if low == high:
        low, high = (low - 0.5, high + 0.5) if tight or low == 0 else (low - 0.1 * abs(low), high + 0.1 * abs(high))
    if not tight:
        room = 0.05 * (high - low)
        low = 0.0 if 0 <= low <= 0.3 * high else low - room  # the natural end, where it is near
        high = high + room
    return Axis(low, high)


def _ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12 - math.floor(math.log10(step))) + 0.0 for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        found = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(found) >= 3:
            return found[:: -(-len(found) // 7)]
    return _ticks(low, high)


def written(value: float, digits: int = 4) -> str:
    """As short as it can be read; of numbers below 1,000 so many digits, where they have them.

    Example:
        1500 -> 1,500; 2500000 -> 2.5M; 0.00001 -> 1e-5
    """
    size = abs(value)
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if size >= unit:
            return f"{value / unit:.4g}{letter}"
    if size >= 1000:
        return f"{value:,.6g}" if size < 1e5 else f"{value / 1e3:.4g}k"
    if size and size < 1e-4:
        mantissa, power = f"{value:.3e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:.{digits}g}"


def thinned(y: Sequence[float], most: int = MOST) -> list[int]:
    """The points of a line that are drawn: of each stretch the lowest, the highest and a gap, where it has one.

    Args:
        y: [n] values, nan where there is a gap.

    Returns:
        Ascending indices, at most `most` + 2, the first and the last point among them.
    """
    if len(y) <= most:
        return list(range(len(y)))
    size = -(-len(y) // (most // 3))
    kept = {0, len(y) - 1}
    for start in range(0, len(y), size):
        stretch = range(start, min(start + size, len(y)))
        known = [number for number in stretch if math.isfinite(y[number])]
        if known:
            kept |= {min(known, key=y.__getitem__), max(known, key=y.__getitem__)}
        kept |= set([number for number in stretch if not math.isfinite(y[number])][:1])
    return sorted(kept)


__all__ = ["Axis", "axis_of", "thinned", "written"]
