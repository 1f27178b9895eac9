"""Which scales FP8 takes."""

from __future__ import annotations

from enum import Enum


class Format(Enum):
    E4M3 = "e4m3"
    HYBRID = "hybrid"


class Recipe:
    def __init__(self, fp8_format: Format = Format.HYBRID, **options: object):
        self.fp8_format = fp8_format


class Float8CurrentScaling(Recipe): ...


class Float8BlockScaling(Recipe): ...


class MXFP8BlockScaling(Recipe): ...


class DelayedScaling(Recipe):
    def __init__(self, amax_history_len: int = 1024, amax_compute_algo: str = "max", **options: object):
        super().__init__(options.get("fp8_format", Format.HYBRID))
        self.amax_history_len, self.amax_compute_algo = amax_history_len, amax_compute_algo
