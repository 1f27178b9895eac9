"""The two families of problems: right, told apart, and in no two files."""

import json
import random
import re

import pytest

from evidence.right import right
from evidence.tasks import FILES, LARGEST, Amounts, gathering, make_files, parting

AMOUNTS = Amounts(pretrain=60, demonstrations=20, problems=10)


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("style", ["plain", "worked"])
@pytest.mark.parametrize(("family", "sign"), [(gathering, "+"), (parting, "-")])
def test_solutions_are_right(family, sign, style):
    rng = random.Random(0)
    for _ in range(200):
        row = family(rng, style)
        first, second, result = map(int, re.search(rf"(\d+) \{sign} (\d+) = (\d+)", row["answer"]).groups())
        assert result == (first + second if sign == "+" else first - second)
        assert row["answer"].endswith(f"\n#### {result}")
        assert {first, second} <= set(map(int, re.findall(r"\d+", row["question"]))) or first == second
        assert 2 <= second <= LARGEST
        assert (len(row["answer"].splitlines()[0].split(" ")) == 5) == (style == "plain")


def test_files(tmp_path):
    make_files(tmp_path, AMOUNTS)
    found = {name: rows(tmp_path, name) for name in FILES}
    assert {name: len(some) for name, some in found.items()} == {
        "pretrain": 60, "demonstrations": 20, "preferences": 20, "valid": 10, "in": 10, "out": 10,
    }  # fmt: skip
    questions = [row["question"] for name in FILES if name != "preferences" for row in found[name]]
    assert len(set(questions)) == len(questions)
    assert {pair["prompt"] for pair in found["preferences"]} == {row["question"] for row in found["demonstrations"]}
    assert all(pair["chosen"] != pair["rejected"] for pair in found["preferences"])
    assert all(" - " in row["answer"] for row in found["out"])
    assert all(" + " in row["answer"] for name in ("demonstrations", "valid", "in") for row in found[name])
    assert {sign for row in found["pretrain"] for sign in "+-" if f" {sign} " in row["answer"]} == {"+", "-"}


def test_the_same_amounts_give_the_same_files(tmp_path):
    for name in ("one", "two"):
        make_files(tmp_path / name, AMOUNTS)
    assert all((tmp_path / "one" / f"{n}.jsonl").read_text() == (tmp_path / "two" / f"{n}.jsonl").read_text() for n in FILES)


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("4 + 8 = 12\n#### 12", 1.0), ("#### 12\n", 1.0), ("#### 13", 0.0), ("#### 112", 0.0), ("12", 0.0), ("", 0.0),
        ("#### 12 #### 13", 0.0), ("#### 13 #### 12", 1.0), ("#### 012", 0.0),
    ],
)  # fmt: skip
def test_who_is_right(response, value):
    assert right("?", response, {"answer": "4 + 8 = 12\n#### 12"}) == value
