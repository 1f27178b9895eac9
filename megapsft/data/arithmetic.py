"""Worded arithmetic with worked solutions, correct by construction: training data that needs no download.

The columns are those of GSM8K: `question`, and an `answer` whose lines end with `#### N`. Every step is written
`a + b = c` (with + - * /), all numbers are whole, and no quantity is 1, so nothing needs a singular. From such rows, these or
a file's, come preferences and recorded rollouts: right solutions, and the same with another number at the end.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from megapsft.config import ColumnsConfig
from megapsft.data.rows import read_rows
from megapsft.errors import Refused
from megapsft.output.whole import whole

MOST = 100_000  # far fewer than there are different problems, so drawing again on a repeat stays cheap

PEOPLE = (
    ("Amelia", "she"), ("Ben", "he"), ("Chloe", "she"), ("Daniel", "he"), ("Elena", "she"), ("Farid", "he"),
    ("Grace", "she"), ("Hugo", "he"), ("Ines", "she"), ("Jonas", "he"), ("Keiko", "she"), ("Liam", "he"),
    ("Maria", "she"), ("Noah", "he"), ("Olga", "she"), ("Pedro", "he"), ("Rosa", "she"), ("Samir", "he"),
    ("Tara", "she"), ("Victor", "he"), ("Wanda", "she"), ("Yusuf", "he"), ("Zoe", "she"), ("Arjun", "he"),
)  # fmt: skip
GOODS = (
    "notebooks", "pencils", "lanterns", "candles", "baskets", "kites", "mugs", "puzzles", "scarves", "postcards",
    "brushes", "plates", "bracelets", "folders", "jars of honey", "bags of rice",
)  # fmt: skip
TREATS = ("apples", "cookies", "plums", "stickers", "marbles", "peaches", "muffins", "walnuts", "pancakes", "cherries")
CONTAINERS = ("boxes", "crates", "cartons", "trays", "chests")
JOBS = ("at the bakery", "in the library", "at the garden centre", "in the bike shop", "at the cinema", "in the museum")
DREAMS = ("a bicycle", "a guitar", "a tent", "a camera", "a telescope", "a skateboard", "a desk")

OPENINGS = ("", "Let us see.\n", "Step by step:\n", "Here is how.\n")  # so that right responses to a prompt are not all the same
FINAL = re.compile(r"#### *(-?\d[\d,]*(?:\.\d+)?)\s*$")

Problem = tuple[str, list[str], int]  # question, steps, answer


def generate(count: int, seed: int, level: Level = "worded") -> list[dict[str, str]]:
    """`count` different problems, the same ones for the same seed: [{"question": ..., "answer": ...}].

    Args:
        level: worded has one to three steps, products and quotients; easy has one sum or difference of numbers below 30.

    Raises:
        Refused: count below 1 or above 100,000.
    """
    if not 1 <= count <= MOST:
        raise Refused(f"count={count}", f"must be from 1 to {MOST}", "ask for fewer, or join files of different seeds")
    rng = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        question, steps, number = rng.choice(LEVELS[level])(rng)
        rows.setdefault(question, "\n".join([*steps, f"#### {number}"]))
    return [{"question": question, "answer": answer} for question, answer in rows.items()]


def read_problems(path: str | Path, count: int | None = None) -> list[dict[str, str]]:
    """The rows of a JSONL file with the columns of GSM8K, or the first `count`: [{"question": ..., "answer": ...}].

    Raises:
        Refused: as `read_rows`; an answer that does not end with `#### N`.
    """
    rows = read_rows(path, ColumnsConfig(prompt="question", demonstration="answer"), count)
    for row in rows:
        if not (isinstance(row.prompt, str) and FINAL.search(row.demonstration)):
            raise Refused(row.source, "is not a question with an answer that ends with `#### N`", "use rows like those of GSM8K")
    return [{"question": row.prompt, "answer": row.demonstration} for row in rows]


def preferences(problems: Iterable[dict[str, str]], seed: int) -> Iterator[dict[str, str]]:
    """Of each problem its solution against one that ends otherwise: {"prompt": ..., "chosen": ..., "rejected": ...}."""
    rng = random.Random(seed)
    for row in problems:
        yield {"prompt": row["question"], "chosen": row["answer"], "rejected": wrong(row["answer"], rng)}


def rollouts(problems: Iterable[dict[str, str]], seed: int, each: int) -> Iterator[dict[str, Any]]:
    """Of each problem what a policy might have answered, in the format of recorded rollouts, with its solution for demonstration.

    A problem is as hard as it may be: the probability that a response is right is drawn for each from 0..1, so of `each` + 1
    groups one is all wrong and one all right. A right response has reward 1, a wrong one 0.

    Raises:
        Refused: `each` below 1.
    """
    if each < 1:
        raise Refused(f"{each} rollouts a prompt", "must be 1 or more", "ask for 4")
    rng = random.Random(seed)
    for row in problems:
        ease = rng.random()
        responses = []
        for _ in range(each):
            right = rng.random() < ease
            text = rng.choice(OPENINGS) + (row["answer"] if right else wrong(row["answer"], rng))
            responses.append({"response": text, "reward": float(right)})
        yield {"prompt": row["question"], "rollouts": responses, "demonstration": row["answer"]}


def wrong(answer: str, rng: random.Random) -> str:
    """The answer with another final number, in the last line and where the solution says it last."""
    found = FINAL.search(answer)
    body, final = answer[: found.start(1)], found[1]
    number = Decimal(final.replace(",", ""))
    number += rng.choice([n for n in range(-10, 11) if n and number + n >= 0] or [1])
    other = f"{number:,}" if "," in final else f"{number}"
    plain = final.replace(",", "")
    last = list(re.finditer(rf"(?<![\d.,])(?:{re.escape(final)}|{re.escape(plain)})(?![\d]|[.,]\d)", body))
    if last:
        body = body[: last[-1].start()] + other + body[last[-1].end() :]
    return body + other


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """One JSON object a line; missing folders are made."""
    with whole(Path(path)) as place, place.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def purchase(rng: random.Random) -> Problem:
    (name, he), goods = rng.choice(PEOPLE), rng.choice(GOODS)
    amount, price = rng.randint(2, 40), rng.randint(2, 25)
    total = amount * price
    question = f"{name} buys {amount} {goods} at {price} dollars each. How many dollars does {he} pay in total?"
    return question, [f"The {goods} cost {amount} * {price} = {total} dollars."], total


def gift(rng: random.Random) -> Problem:
    (name, he), (friend, _), treats = rng.choice(PEOPLE), rng.choice(PEOPLE), rng.choice(TREATS)
    if friend == name:
        friend = "a neighbour"
    had, more = rng.randint(20, 90), rng.randint(2, 40)
    given = rng.randint(2, had - 2)
    left, now = had - given, had - given + more
    question = (
        f"{name} has {had} {treats}. After giving {given} of them to {friend}, {he} receives {more} more from an aunt. "
        f"How many {treats} does {name} have now?"
    )
    steps = [
        f"After the gift {name} has {had} - {given} = {left} {treats}.",
        f"With those from the aunt {he} has {left} + {more} = {now} {treats}.",
    ]
    return question, steps, now


def stock(rng: random.Random) -> Problem:
    goods, containers = rng.choice(GOODS), rng.choice(CONTAINERS)
    boxes, each = rng.randint(3, 30), rng.randint(4, 36)
    total = boxes * each
    sold = rng.randint(2, total - 2)
    left = total - sold
    question = (
        f"A shop receives {boxes} {containers} with {each} {goods} in each. By the end of the week it has sold {sold} of the "
        f"{goods}. How many {goods} are left?"
    )
    steps = [
        f"The shop receives {boxes} * {each} = {total} {goods}.",
        f"After the sales {total} - {sold} = {left} {goods} are left.",
    ]
    return question, steps, left


def sharing(rng: random.Random) -> Problem:
    (name, he), treats = rng.choice(PEOPLE), rng.choice(TREATS)
    children, each, kept = rng.randint(3, 15), rng.randint(2, 20), rng.randint(2, 20)
    shared = children * each
    total = shared + kept
    question = (
        f"{name} has {total} {treats}. {he.capitalize()} keeps {kept} and shares the others equally among {children} children. "
        f"How many {treats} does each child get?"
    )
    steps = [
        f"{name} shares {total} - {kept} = {shared} {treats}.",
        f"Each child gets {shared} / {children} = {each} {treats}.",
    ]
    return question, steps, each


def wages(rng: random.Random) -> Problem:
    (name, he), job = rng.choice(PEOPLE), rng.choice(JOBS)
    hours, rate, bonus = rng.randint(3, 40), rng.randint(9, 30), rng.randint(5, 60)
    pay = hours * rate
    whole = pay + bonus
    spent = rng.randint(2, whole - 2)
    left = whole - spent
    question = (
        f"{name} works {hours} hours {job} and earns {rate} dollars an hour. {he.capitalize()} also gets a bonus of {bonus} "
        f"dollars and then spends {spent} dollars on groceries. How many dollars does {he} have left?"
    )
    steps = [
        f"For the hours {name} earns {hours} * {rate} = {pay} dollars.",
        f"With the bonus that is {pay} + {bonus} = {whole} dollars.",
        f"After the groceries {he} has {whole} - {spent} = {left} dollars left.",
    ]
    return question, steps, left


def reading(rng: random.Random) -> Problem:
    name, he = rng.choice(PEOPLE)
    first, a_day, rest = rng.randint(2, 14), rng.randint(5, 40), rng.randint(2, 20)
    faster = rng.randint(5, 40)
    read, remaining = first * a_day, rest * faster
    pages = read + remaining
    question = (
        f"A book has {pages} pages. {name} reads {a_day} pages a day for {first} days. If {he} reads {faster} pages a day from "
        f"then on, how many more days does {he} need to finish the book?"
    )
    steps = [
        f"In the first days {name} reads {first} * {a_day} = {read} pages.",
        f"That leaves {pages} - {read} = {remaining} pages.",
        f"{he.capitalize()} needs {remaining} / {faster} = {rest} more days.",
    ]
    return question, steps, rest


def bill(rng: random.Random) -> Problem:
    (name, he), (first, second) = rng.choice(PEOPLE), rng.sample(GOODS, 2)
    many, price, few, cost = rng.randint(2, 15), rng.randint(2, 20), rng.randint(2, 15), rng.randint(2, 20)
    one, other = many * price, few * cost
    question = (
        f"{name} buys {many} {first} for {price} dollars each and {few} {second} for {cost} dollars each. How many dollars does "
        f"{he} spend altogether?"
    )
    steps = [
        f"The {first} cost {many} * {price} = {one} dollars.",
        f"The {second} cost {few} * {cost} = {other} dollars.",
        f"Altogether {name} spends {one} + {other} = {one + other} dollars.",
    ]
    return question, steps, one + other


def journey(rng: random.Random) -> Problem:
    name, he = rng.choice(PEOPLE)
    morning, fast, evening, slow = rng.randint(2, 6), rng.randint(40, 110), rng.randint(2, 6), rng.randint(25, 90)
    one, other = morning * fast, evening * slow
    question = (
        f"{name} drives for {morning} hours at {fast} kilometres an hour. After a break {he} drives for {evening} hours at "
        f"{slow} kilometres an hour. How many kilometres does {he} drive in all?"
    )
    steps = [
        f"Before the break {name} drives {morning} * {fast} = {one} kilometres.",
        f"After it {he} drives {evening} * {slow} = {other} kilometres.",
        f"In all that is {one} + {other} = {one + other} kilometres.",
    ]
    return question, steps, one + other


def savings(rng: random.Random) -> Problem:
    (name, he), dream = rng.choice(PEOPLE), rng.choice(DREAMS)
    weeks, weekly, saved = rng.randint(2, 30), rng.randint(3, 30), rng.randint(5, 90)
    missing = weeks * weekly
    price = missing + saved
    question = (
        f"{name} wants to buy {dream} that costs {price} dollars and has already saved {saved} dollars. If {he} saves {weekly} "
        f"dollars every week, in how many weeks can {he} buy it?"
    )
    steps = [
        f"{name} still needs {price} - {saved} = {missing} dollars.",
        f"Saving them takes {missing} / {weekly} = {weeks} weeks.",
    ]
    return question, steps, weeks


def comparison(rng: random.Random) -> Problem:
    (first, _), (second, _), (third, _) = rng.sample(PEOPLE, 3)
    treats = rng.choice(TREATS)
    half, more = rng.randint(3, 60), rng.randint(2, 30)
    most = half + more
    question = (
        f"{first} collects {2 * half} {treats}. {second} collects half as many as {first}, and {third} collects {more} more than "
        f"{second}. How many {treats} do {second} and {third} collect together?"
    )
    steps = [
        f"{second} collects {2 * half} / 2 = {half} {treats}.",
        f"{third} collects {half} + {more} = {most} {treats}.",
        f"Together they collect {half} + {most} = {half + most} {treats}.",
    ]
    return question, steps, half + most


def more(rng: random.Random) -> Problem:
    (name, he), treats = rng.choice(PEOPLE), rng.choice(TREATS)
    first, second = rng.randint(2, 29), rng.randint(2, 29)
    question = f"{name} has {first} {treats} and gets {second} more. How many {treats} does {he} have now?"
    return question, [f"{first} + {second} = {first + second}"], first + second


def fewer(rng: random.Random) -> Problem:
    (name, he), treats = rng.choice(PEOPLE), rng.choice(TREATS)
    left, given = rng.randint(2, 19), rng.randint(2, 10)
    question = f"{name} has {left + given} {treats} and gives {given} away. How many {treats} does {he} have now?"
    return question, [f"{left + given} - {given} = {left}"], left


Level = Literal["worded", "easy"]
LEVELS: dict[str, tuple[Callable[[random.Random], Problem], ...]] = {
    "worded": (purchase, gift, stock, sharing, wages, reading, bill, journey, savings, comparison),
    "easy": (more, fewer),
}
