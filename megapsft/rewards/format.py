"""Whether a response has the form that was asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megapsft.errors import Refused
from megapsft.rewards._base import Base, Part, Response, within_seconds
from megapsft.rewards._pool import Pool

MATCHES = "megapsft.rewards._match:matches"


@dataclass(frozen=True, kw_only=True)
class Format(Base):
    r"""1[the whole response matches `pattern`, a dot standing for a newline as well].

    Any pattern of Python's `re` is taken, also one that backtracks for ever on some responses: it runs in a worker, and a
    response that takes longer than `timeout` gets 0.

    Example:
        "<think>2 + 2</think> \boxed{4}" -> 1.0    "\boxed{4}" -> 0.0
    """

    pattern: str = r"\s*<think>.+?</think>.*\S\s*"  # thoughts, and something after them
    timeout: float = 5.0  # seconds, for one response

    def __post_init__(self) -> None:
        super().__post_init__()
        within_seconds(self.timeout)
        try:
            re.compile(self.pattern, re.DOTALL)
        except re.error as error:
            remedy = "see Python's re; in YAML put it in single quotes"
            raise Refused(f"pattern={self.pattern!r}", f"is not a regular expression: {error}", remedy) from None

    def __call__(self, responses: Sequence[Response], pool: Pool) -> list[Part]:
        texts = list(dict.fromkeys(response.text for response in responses))
        outcomes = pool.map(MATCHES, [(text,) for text in texts], self.timeout, {"pattern": self.pattern})
        parts = {text: Part(found.value, found.failure) for text, found in zip(texts, outcomes, strict=True)}
        return [parts[response.text] for response in responses]
