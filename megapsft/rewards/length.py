"""A price on length: tokens beyond a soft limit cost, each the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megapsft.errors import Refused
from megapsft.rewards._base import Base, Part, Response
from megapsft.rewards._pool import Pool


@dataclass(frozen=True, kw_only=True)
class Length(Base):
    """max(-most, -price max(0, n - soft_limit)), n the tokens of the response, its terminator included.

    Unlike `overlong` it knows no hard limit: it prices length as such.

    Example:
        soft_limit 100, price 0.01, most 1
        n = 80 -> 0.0    n = 150 -> -0.5    n = 900 -> -1.0
    """

    soft_limit: int = 1024  # tokens
    price: float = 0.001  # for each token beyond
    most: float = 1.0  # that a response can lose

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.soft_limit < 0:
            raise Refused(f"soft_limit={self.soft_limit}", "must be 0 or more", "give the tokens that cost nothing")
        for name in ("price", "most"):
            if not getattr(self, name) >= 0:
                raise Refused(f"{name}={getattr(self, name)}", "must be 0 or more: it is a punishment", "the weight scales it")

    def __call__(self, responses: Sequence[Response], pool: Pool) -> list[Part]:
        beyond = [max(0, response.tokens - self.soft_limit) for response in responses]
        return [Part(max(-self.most, -self.price * tokens) if tokens else 0.0) for tokens in beyond]
