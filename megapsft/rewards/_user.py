"""A reward of the user's own: a function by its dotted path, or in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megapsft.errors import Refused
from megapsft.rewards._base import Base, Part, Response, within_seconds
from megapsft.rewards._pool import Pool


@dataclass(frozen=True, kw_only=True)
class User(Base):
    """What the function returns for `function(prompt, response, row, **options)`, a finite number.

    It runs in a worker, like all that may not return: it must not count on what other calls have left behind. Where it is late
    or its process ends the response gets 0, which the metrics count.

    Raises:
        Refused: it is not there or does not take these arguments (`check`); it raised, or returned something else: names the row.
    """

    target: str  # package.module:function or path/to/file.py:function
    options: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 30.0  # seconds, for one response

    def __post_init__(self) -> None:
        super().__post_init__()
        within_seconds(self.timeout)

    def check(self, pool: Pool) -> None:
        pool.check(self.target, 3, self.options)

    def __call__(self, responses: Sequence[Response], pool: Pool) -> list[Part]:
        calls = [(response.prompt, response.text, dict(response.row)) for response in responses]
        outcomes = pool.map(self.target, calls, self.timeout, self.options)
        for response, outcome in zip(responses, outcomes, strict=True):
            if outcome.failure == "error":
                remedy = "mend it: it returns a finite number for every response"
                raise Refused(f"reward {self.target} of {response.source}", f"failed: {outcome.message}", remedy)
        return [Part(outcome.value, outcome.failure) for outcome in outcomes]


def user_target(name: str) -> str:
    """`mine/reward.py` is the function `reward` of that file, whose path is made absolute.

    Raises:
        Refused: the file is not there.
    """
    place, _, function = name.partition(":")
    if not place.endswith(".py"):
        return name
    if not Path(place).is_file():
        raise Refused(f"reward {name}", "is not a file", "give the path of a file with a function `reward`, or file.py:function")
    return f"{Path(place).resolve()}:{function or 'reward'}"
