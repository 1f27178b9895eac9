import json
import random
import re
from operator import add, floordiv, mul, sub

import pytest

from megapsft.data.arithmetic import FINAL, LEVELS, MOST, generate, preferences, read_problems, rollouts, write_jsonl, wrong
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
    assert len(LEVELS["worded"]) >= 6


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


def test_preferences_are_right_against_wrong(rows):
    pairs = list(preferences(rows, seed=0))
    assert [(pair["prompt"], pair["chosen"]) for pair in pairs] == [(row["question"], row["answer"]) for row in rows]
    for pair in pairs:
        right, wrong = pair["chosen"], pair["rejected"]
        assert 1 <= abs(int(FINAL.search(right)[1]) - int(FINAL.search(wrong)[1])) <= 10
        assert len(re.findall(r"\d+", right)) == len(re.findall(r"\d+", wrong))
        pairs_of_numbers = zip(re.findall(r"\d+", right), re.findall(r"\d+", wrong), strict=True)
        assert sum(a != b for a, b in pairs_of_numbers) == 2  # where the last step says it, and behind ####
        *_, last = STEP.findall(wrong)
        assert last[-1] == FINAL.search(wrong)[1]


@pytest.mark.parametrize(
    ("answer", "pattern"),
    [
        ("So $1,000 it is, after 1000.\n#### 1,000", r"So \$1,000 it is, after ((?:1,0|9)\d\d)\.\n#### ((?:1,0|9)\d\d)"),
        ("Each pays 2.50, not 12.50 or 2.505.\n#### 2.50", r"Each pays (\d+\.50), not 12\.50 or 2\.505\.\n#### (\d+\.50)"),
        ("5 - 8 = -3\n#### -3", r"5 - 8 = (-?\d+)\n#### (-?\d+)"),
        ("None of it is said.\n#### 7", r"None of it is said\.\n#### ()(\d+)"),
        ("0\n#### 0", r"(\d+)\n#### (\d+)"),
    ],
)
def test_a_wrong_answer_is_written_like_the_right_one(answer, pattern):
    for seed in range(50):
        text = wrong(answer, random.Random(seed))
        found = re.fullmatch(pattern, text)
        assert found, text
        assert found[2] != FINAL.search(answer)[1]
        assert found[1] in ("", found[2])


def test_rollouts_are_rewarded_by_their_answers(rows):
    counts = [0] * 5
    for row, problem in zip(rollouts(rows, seed=0, each=4), rows, strict=True):
        assert (row["prompt"], row["demonstration"]) == (problem["question"], problem["answer"])
        for rollout in row["rollouts"]:
            assert rollout["reward"] == (FINAL.search(rollout["response"])[1] == FINAL.search(problem["answer"])[1])
        counts[int(sum(rollout["reward"] for rollout in row["rollouts"]))] += 1
    assert all(300 < count < 500 for count in counts), counts  # a fifth of 2000 each


def test_right_rollouts_are_not_all_the_same(rows):
    right = [{r["response"] for r in row["rollouts"] if r["reward"]} for row in rollouts(rows, seed=0, each=8)]
    assert sum(len(texts) > 1 for texts in right) > 1000


def test_a_seed_is_a_set_of_rollouts_and_of_preferences(rows):
    some = rows[:50]
    assert list(rollouts(some, 3, 4)) == list(rollouts(some, 3, 4)) != list(rollouts(some, 4, 4))
    assert list(preferences(some, 3)) == list(preferences(some, 3)) != list(preferences(some, 4))


def test_problems_of_a_file(rows, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [row | {"more": 1} for row in rows[:5]])
    assert read_problems(tmp_path / "rows.jsonl") == rows[:5]
    assert read_problems(tmp_path / "rows.jsonl", 2) == rows[:2]


@pytest.mark.parametrize("answer", ["42", "#### forty", "#### 42 apples"])
def test_an_answer_without_a_final_number_is_refused(tmp_path, answer):
    write_jsonl(tmp_path / "rows.jsonl", [{"question": "q", "answer": answer}])
    with pytest.raises(Refused, match=r"rows.jsonl:1: is not a question with an answer that ends with"):
        read_problems(tmp_path / "rows.jsonl")


def test_no_rollouts_are_refused(rows):
    with pytest.raises(Refused, match="0 rollouts a prompt"):
        list(rollouts(rows, seed=0, each=0))
