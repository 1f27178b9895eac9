"""Whether a response ends with the right answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

from megapsft.errors import Refused
from megapsft.rewards._base import Base, Part, Response, within_seconds
from megapsft.rewards._normal import normalised, number
from megapsft.rewards._pool import Pool
from megapsft.rewards._process import Outcome
from megapsft.rewards.answer import final_answer

MOST_CHARACTERS = 10_000  # a longer answer is right only where it is the reference letter by letter
DOOR_SECONDS = 60.0  # for the question at the door, on a machine however busy
EQUAL = "megapsft.rewards._verify:equal"


@dataclass(frozen=True, kw_only=True)
class MathAnswer(Base):
    r"""1[the final answer of the response equals that of the reference], `final_answer` saying which that is.

    Answers are normalised and compared as text; two plain numbers exactly, and no further (42.0 is 42, 0.333 is not 1/3). All
    else is asked of math-verify, in a worker; 0 where that is late, ends its process, raises, or understands nothing.

    Raises:
        Refused: on a response without a reference.

    Example:
        reference "\frac{1}{2}"
        \boxed{0.5} -> 1.0    \boxed{\dfrac12} -> 1.0    \boxed{2} -> 0.0    "one half" -> 0.0
    """

    needs_reference: ClassVar[bool] = True

    timeout: float = 5.0  # seconds of math-verify, for one answer

    def __post_init__(self) -> None:
        super().__post_init__()
        within_seconds(self.timeout)
        if find_spec("math_verify") is None:
            raise Refused("reward math_answer", "needs math-verify, which is not installed", "pip install 'megapsft[math]'")

    def check(self, pool: Pool) -> None:
        (outcome,) = pool.map(EQUAL, [("0.5", r"\frac{1}{2}")], DOOR_SECONDS)
        if outcome.value != 1:
            rule = f"does not see that 0.5 is 1/2: {outcome.message or 'it says they differ'}"
            raise Refused("math-verify", rule, "install the version of requirements/laptop.txt")

    def __call__(self, responses: Sequence[Response], pool: Pool) -> list[Part]:
        return score([(response.text, _reference(response)) for response in responses], pool, self.timeout)


def score(pairs: Sequence[tuple[str, str]], pool: Pool, timeout: float = 5.0) -> list[Part]:
    """Of each (response, reference) 1 or 0, in their order; each different question is asked once."""
    answers = [(final_answer(response), final_answer(reference) or reference) for response, reference in pairs]
    known = {pair: plainly(*pair) for pair in answers}
    asked = [pair for pair, right in known.items() if right is None]
    outcomes = dict(zip(asked, pool.map(EQUAL, asked, timeout), strict=True))
    return [_part(known[pair], outcomes.get(pair)) for pair in answers]


def plainly(answer: str | None, reference: str) -> bool | None:
    """Whether the answer is the reference where that can be seen without computer algebra, else None."""
    if answer is None:
        return False
    ours, theirs = normalised(answer), normalised(reference)
    if ours == theirs and ours:
        return True
    first, second = number(ours), number(theirs)
    if first is not None and second is not None:
        return first == second
    if len(answer) > MOST_CHARACTERS or "\\boxed" in answer:  # a box inside of it would be read in its place
        return False
    return None


def _part(plain: bool | None, outcome: Outcome | None) -> Part:
    return Part(float(plain)) if outcome is None else Part(outcome.value, outcome.failure)


def _reference(response: Response) -> str:
    if response.reference is None or not response.reference.strip():
        rule = "has no reference answer to compare with"
        raise Refused(response.source, rule, "name the column that holds it, or take the row out")
    return response.reference
