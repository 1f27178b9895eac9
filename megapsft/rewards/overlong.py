"""Soft overlong punishment: a response that comes close to the length limit is worth less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megapsft.errors import Refused
from megapsft.rewards._base import Base, Part, Response
from megapsft.rewards._pool import Pool


@dataclass(frozen=True, kw_only=True)
class Overlong(Base):
    """`overlong_penalty` of the tokens of the response, as a part of the sum."""

    max_response_length: int  # tokens: the limit of the engine
    buffer: int  # tokens, 1..max_response_length
    factor: float = 1.0  # what a response at the limit loses

    def __post_init__(self) -> None:
        super().__post_init__()
        overlong_penalty(0, self.max_response_length, self.buffer, self.factor)  # refuses what is wrong

    def __call__(self, responses: Sequence[Response], pool: Pool) -> list[Part]:
        options = (self.max_response_length, self.buffer, self.factor)
        return [Part(overlong_penalty(response.tokens, *options)) for response in responses]


def overlong_penalty(length: int, max_response_length: int, buffer: int, factor: float = 1.0) -> float:
    """min(0, -factor (length - (max_response_length - buffer)) / buffer), to be added to the reward of the response.

    0 up to the buffer before the limit, then a straight line that reaches -factor at the limit.

    Args:
        length: tokens of the response, its terminator included; above `max_response_length` the line goes on falling, where the
            paper stays at -1: an engine with that limit makes no such response.
        buffer: tokens, 1..max_response_length.

    Raises:
        Refused: a buffer outside that range, or a negative factor.

    Source: DAPO (Yu et al., 2025), Eq. 13. PSFT (Zhu et al., ICLR 2026), Table 12: limit 10k, buffer 2k.

    Example:
        >>> [overlong_penalty(length, 10240, 2048) for length in (8192, 9216, 10240)]
        [0.0, -0.5, -1.0]
    """
    if not 1 <= buffer <= max_response_length:
        rule = f"must lie in 1..max_response_length={max_response_length}"
        raise Refused(f"buffer={buffer}", rule, "the paper uses a fifth of the limit")
    if not factor >= 0:
        raise Refused(f"factor={factor}", "must be 0 or more: it is a punishment", "the paper uses 1")
    over = length - (max_response_length - buffer)
    return -factor * over / buffer if over > 0 else 0.0
