"""How far a result is from the expected one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
# The deviation is relative down to this fraction of the largest expected number (of 1 for a single number), and absolute
# below: a difference such as logprobs - old_logprobs carries the rounding of its terms, however small it is itself.
FLOOR = {torch.float64: 1e-5, torch.float32: 1.0}


def deviations(expected: Any, actual: Any, dtype: torch.dtype, at: str = "") -> Iterator[tuple[float, str]]:
    """(deviation, where) of every number or array of numbers in `expected`; infinite where `actual` has none like it."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            path = f"{at}.{key}" if at else key
            if isinstance(actual, dict) and key in actual:
                yield from deviations(value, actual[key], dtype, path)
            else:
                yield math.inf, f"{path} (nothing to compare it with)"
    elif isinstance(expected, list) and any(isinstance(item, dict) for item in expected):
        actual = actual if isinstance(actual, list) else []
        if len(actual) != len(expected):
            yield math.inf, f"{at} (of length {len(actual)}, expected {len(expected)})"
        for number, (one, other) in enumerate(zip(expected, actual, strict=False)):
            yield from deviations(one, other, dtype, f"{at}[{number}]")
    else:
        yield array_deviation(expected, actual, dtype), at


def array_deviation(expected: Any, actual: Any, dtype: torch.dtype) -> float:
    """Largest deviation between two arrays of numbers, or two numbers."""
    expected, actual = torch.as_tensor(expected, dtype=torch.float64), torch.as_tensor(actual, dtype=torch.float64)
    if expected.shape != actual.shape:
        return math.inf
    if not expected.numel():
        return 0.0
    scale = expected.abs().max().item() if expected.ndim else 1.0
    floor = FLOOR[dtype] * (scale or 1.0)
    deviation = ((actual - expected).abs() / expected.abs().clamp(min=floor)).max().item()
    return deviation if math.isfinite(deviation) else math.inf
