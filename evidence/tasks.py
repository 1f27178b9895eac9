"""Two families of worded problems with verifiable answers, worded differently: gathering (in-domain) and parting (out of it).

Each has two styles of solution. `plain` is one line of arithmetic, `worked` tells it in sentences, with one of several phrases
that are as good as each other: what no model can foretell, and so a floor under the entropy of one that has not memorised its
demonstrations. Both end with `#### N`, as GSM8K does.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megapsft.data.arithmetic import preferences, write_jsonl

NAMES = ("Ben", "Ines", "Omar", "Tara", "Hugo", "Rosa", "Liam", "Zoe")
THINGS = ("plums", "books", "coins", "shells", "cards", "pens")
LARGEST = 15  # of the numbers that are added, and of the two parts of what is parted

Row = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """How much of everything."""

    pretrain: int  # rows, of both families
    demonstrations: int  # in-domain, worked; preferences are as many
    problems: int  # in each of the three sets that models are measured by
    worked: float = 0.25  # share of solutions in pretraining that are worked
    seed: int = 0


FILES = ("pretrain", "demonstrations", "preferences", "valid", "in", "out")


def gathering(rng: random.Random, style: str) -> Row:
    """A sum of two numbers from 2 to 15."""
    name, things, first, second = _drawn(rng)
    question = rng.choice(
        (
            f"{name} has {first} {things} and gets {second} more. How many {things} now?",
            f"{name} finds {first} {things}, then {second} more. How many {things} in all?",
        )
    )
    opening = rng.choice((f"{name} starts with {first}", f"At first there are {first}", f"First come {first}"))
    then = rng.choice((f"With {second} more", f"Then {second} are added", f"Next come {second} more"))
    return _row(question, f"{opening} {things}. {then}:", f"{first} + {second} = {first + second}", first + second, style)


def parting(rng: random.Random, style: str) -> Row:
    """A difference whose two parts are numbers from 2 to 15."""
    name, things, left, gone = _drawn(rng)
    question = rng.choice(
        (
            f"Of {left + gone} {things}, {name} loses {gone}. How many {things} are left?",
            f"A box of {left + gone} {things}: {name} takes {gone} out. How many {things} stay?",
        )
    )
    opening = rng.choice((f"The box holds {left + gone}", f"Before that there were {left + gone}", f"We count {left + gone}"))
    then = rng.choice((f"Without {gone}", f"After {gone} are gone", f"Less {gone}"))
    return _row(question, f"{opening} {things}. {then}:", f"{left + gone} - {gone} = {left}", left, style)


def make_files(folder: Path, amounts: Amounts) -> None:
    """FOLDER/<name>.jsonl for each of FILES; no question is in two of them, but that preferences are of the demonstrations."""
    rng = random.Random(amounts.seed)
    taken: set[str] = set()

    def draw(count: int, family: Callable[[random.Random, str], Row] | None, worked: float) -> list[Row]:
        found: list[Row] = []
        while len(found) < count:
            style = "worked" if rng.random() < worked else "plain"
            row = (family or rng.choice((gathering, parting)))(rng, style)
            if row["question"] not in taken:
                taken.add(row["question"])
                found.append(row)
        return found

    demonstrations = draw(amounts.demonstrations, gathering, 1.0)
    files: Mapping[str, list[Row]] = {
        "valid": draw(amounts.problems, gathering, 1.0),
        "in": draw(amounts.problems, gathering, 1.0),
        "out": draw(amounts.problems, parting, 1.0),
        "demonstrations": demonstrations,
        "preferences": list(preferences(demonstrations, amounts.seed)),
        "pretrain": draw(amounts.pretrain, None, amounts.worked),
    }
    for name in FILES:
        write_jsonl(folder / f"{name}.jsonl", files[name])


def _drawn(rng: random.Random) -> tuple[str, str, int, int]:
    return rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, LARGEST), rng.randint(2, LARGEST)


def _row(question: str, words: str, sum_: str, answer: int, style: str) -> Row:
    body = f"{words} {sum_}." if style == "worked" else sum_
    return {"question": question, "answer": f"{body}\n#### {answer}"}
