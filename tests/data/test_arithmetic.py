import json
import re
from operator import add, floordiv, mul, sub

import pytest

from megapsft.data.arithmetic import MOST, TEMPLATES, generate, write_jsonl
from megapsft.errors import Refused

STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
OPERATORS = {"+": add, "-": sub, "*": mul, "/": floordiv}


@pytest.fixture(scope="module")
def rows():
    return generate(2000, seed=0)


def test_every_step_is_true(rows):
    for row in rows:
        steps = STEP.findall(row["answer"])
        assert 1 <= len(steps) <= 3
        for a, operator, b, result in steps:
            assert OPERATORS[operator](int(a), int(b)) == int(result), row
            if operator == "/":
                assert int(a) % int(b) == 0, row


def test_the_last_step_is_the_answer(rows):
    for row in rows:
        *_, last = STEP.findall(row["answer"])
        assert row["answer"].splitlines()[-1] == f"#### {last[-1]}"


def test_every_number_of_a_step_is_given_or_was_worked_out(rows):
    for row in rows:
        known = set(re.findall(r"\d+", row["question"]))
        known |= {"2"} if "half as many" in row["question"] else set()
        for a, _, b, result in STEP.findall(row["answer"]):
            assert {a, b} <= known, row
            known.add(result)


def test_every_quantity_is_a_plural(rows):
    assert all("1" not in re.findall(r"\d+", row["question"] + row["answer"]) for row in rows)


def test_no_problem_comes_twice(rows):
    assert len({row["question"] for row in rows}) == 2000


def test_problems_have_one_to_three_steps(rows):
    shapes = {len(STEP.findall(row["answer"])) for row in rows}
    assert shapes == {1, 2, 3}
    assert len(TEMPLATES) >= 6


def test_a_seed_is_a_data_set(rows):
    assert generate(2000, seed=0) == rows
    assert generate(50, seed=0) == rows[:50]
    assert generate(50, seed=1) != rows[:50]


def test_written_lines_read_back(rows, tmp_path):
    path = tmp_path / "folder" / "rows.jsonl"
    write_jsonl(path, rows)
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows


@pytest.mark.parametrize("count", [0, MOST + 1])
def test_a_count_out_of_range_is_refused(count):
    with pytest.raises(Refused):
        generate(count, seed=0)
