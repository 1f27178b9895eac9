"""The aggregations that an objective over single tokens can have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megapsft.errors import Refused
from megapsft.objectives._base import Base

Aggregation = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum-over-B-Lmax", "sum-over-Lmax", "token-sum"
]


@dataclass(frozen=True, kw_only=True)
class PerToken(Base):
    """Base of the objectives whose loss is a weighted sum over tokens, with weights that the user may choose."""

    aggregation: Aggregation = "token-mean"
    max_response_length: int | None = None  # L_max, the constant that the Lmax aggregations divide by

    def __post_init__(self) -> None:
        super().__post_init__()
        over_lmax = self.aggregation.endswith("Lmax")
        if over_lmax and (self.max_response_length is None or self.max_response_length < 1):
            raise Refused(
                f"max_response_length={self.max_response_length}",
                f"aggregation={self.aggregation!r} divides by it",
                "set the length of the longest response that is allowed, 1 or more",
            )
        if not over_lmax and self.max_response_length is not None:
            raise Refused(
                f"max_response_length={self.max_response_length}",
                f"aggregation={self.aggregation!r} does not use it",
                "leave it out, or use sum-over-B-Lmax or sum-over-Lmax",
            )
