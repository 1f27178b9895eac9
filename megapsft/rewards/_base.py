"""What every reward says about itself, and what it is given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from megapsft.errors import Refused
from megapsft.rewards._pool import Pool
from megapsft.rewards._process import Failure


@dataclass(frozen=True, kw_only=True)
class Response:
    """One response and what it is measured by."""

    prompt: str | list[dict[str, Any]]  # a user turn, or chat messages
    text: str  # of the response, decoded, without its terminator
    tokens: int  # of the response, its terminator included
    source: str  # "file:line" of the prompt, for messages
    reference: str | None = None  # the right answer, or a solution that ends with it; None where the row has none
    row: Mapping[str, Any] = field(default_factory=dict)  # as it stands in the file, for rewards of the user's own


@dataclass(frozen=True)
class Part:
    """What one reward gives one response, unweighted; 0 where its verifier failed."""

    value: float
    failure: Failure | None = None


@dataclass(frozen=True, kw_only=True)
class Base:
    """Base of the rewards. The same response is worth the same whatever else is in the batch, and at any time."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}

    needs_reference: ClassVar[bool] = False  # whether it refuses a response without one

    weight: float = 1.0  # in the sum; 0 measures only
    label: str | None = None  # of its metrics, `reward/<label>`; None is its name

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise Refused(f"weight={self.weight}", "must be finite", "1 is the default, 0 measures only")

    def check(self, pool: Pool) -> None:
        """Refuse what can be known before there is a response. Here: nothing."""

    def __call__(self, responses: Sequence[Response], pool: Pool) -> list[Part]:
        """Of each response its part, in their order; what may not return runs in the pool."""
        raise NotImplementedError


def within_seconds(timeout: float) -> None:
    """Refuse a time limit that is none."""
    if not 0 < timeout < math.inf:
        raise Refused(f"timeout={timeout}", "must be above 0 and finite", "give seconds, such as 5")
