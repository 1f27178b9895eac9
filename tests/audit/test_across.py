"""Faults that rows have together, planted and found. Not here: how near texts are found (test_shingles.py)."""

import pytest

from megapsft.audit.across import RULES_ACROSS, Problem
from megapsft.audit.rules import ROW_RULES
from megapsft.data.arithmetic import generate, preferences, rollouts
from tests.audit.conftest import found


def test_a_row_twice(clean, look):
    clean[9] = clean[3] | {"demonstration": clean[3]["demonstration"].replace(" ", "  ")}
    audit = look(clean)
    assert found(audit) == {"duplicate": [10]}
    assert audit.warnings[0].found == ((10, "as row 4"),)


def test_a_row_almost_twice(clean, look):
    clean[9] = clean[3] | {"prompt": clean[3]["prompt"] + " Explain."}
    audit = look(clean)
    assert found(audit) == {"near-duplicate": [10]}
    assert audit.warnings[0].found[0][1].endswith("% of row 4")


def test_the_same_words_with_another_number_are_another_problem(clean, look):
    words = "There are {} apples in the basket of the old gardener, who likes them very much. How many apples are there now?"
    clean[3:5] = [{"prompt": words.format(n), "demonstration": f"#### {n}"} for n in (5, 6)]
    assert found(look(clean)) == {}


@pytest.mark.parametrize("around", ["{}", "{}\nReason step by step.", "Solve this. {} Answer with a number."])
def test_a_problem_of_an_evaluation(around, clean, look):
    clean[11]["prompt"] = around.format(generate(3, 99)[1]["question"])
    evaluation = tuple(Problem(source=f"test.jsonl:{line}", text=row["question"]) for line, row in enumerate(generate(3, 99), 1))
    audit = look(clean, evaluation=evaluation)
    assert found(audit) == {"overlap": [12]}
    assert audit.warnings[0].found[0][1] == "100% of test.jsonl:2"


def test_a_short_problem_is_found_where_it_is_all_that_is_asked(clean, look):
    clean[11]["prompt"], clean[12]["prompt"] = "What is 2 + 3?", clean[12]["prompt"] + " Is it more than what is 2 + 3?"
    assert found(look(clean, evaluation=(Problem(source="test.jsonl:1", text="what is 2+3 ?"),))) == {"overlap": [12]}


def test_another_answer_to_the_same_prompt(clean, look):
    clean[20] = {"prompt": clean[5]["prompt"], "demonstration": "Surely it is this.\n#### 123456"}
    audit = look(clean)
    assert found(audit) == {"conflict": [21]}
    assert audit.warnings[0].found[0][1].startswith("'123456', and in row 6 ")
    same = clean[5]["demonstration"].rpartition("#### ")[2]
    clean[20]["demonstration"] = f"By other means: \\boxed{{{same}}}"
    assert found(look(clean)) == {}


def test_a_pair_that_is_ranked_otherwise(look):
    rows = list(preferences(generate(40, 1), 0))
    rows[30] = {"prompt": rows[2]["prompt"], "chosen": rows[2]["rejected"], "rejected": rows[2]["chosen"]}
    rules = found(look(rows, "data.kind=preferences", "objective.name=dpo"))
    assert rules["conflict"] == [31]


def test_a_response_that_is_rewarded_otherwise(look):
    rows = list(rollouts(generate(40, 1), 0, each=2))
    rows[6]["rollouts"] = [{"response": "It is 5.", "reward": reward} for reward in (0.0, 1.0)]
    audit = look(rows, "data.kind=rollouts", "objective.name=grpo")
    assert found(audit) == {"conflict": [7]}
    assert audit.warnings[0].found == ((7, "'reward 1', and in row 7 'reward 0'"),)


def test_references_that_differ(look):
    rows = [{"prompt": row["question"], "reference": row["answer"]} for row in generate(40, 1)]
    rows[8] = rows[2] | {"reference": "-3"}
    overrides = ["data.kind=prompts", "objective.name=grpo", "rewards=[{name: math_answer}]", "rollout.max_tokens=64"]
    assert found(look(rows, *overrides)) == {"duplicate": [9], "conflict": [9]}


def test_a_row_that_is_far_too_long(clean, look):
    clean[33]["demonstration"] = "".join(f"{n} and " for n in range(700)) + clean[33]["demonstration"]
    assert found(look(clean, "data.max_length=8192")) == {"outlier": [34]}
    assert found(look(clean[25:], "data.max_length=8192")) == {}  # of so few nobody knows what is usual


def test_recorded_ids_are_compared_as_what_they_spell(look, template):
    rows = [
        {
            "prompt_token_ids": template.tokenise([template.render_prompt(row["question"])])[0],
            "rollouts": [{"response": row["answer"], "reward": 1.0}],
        }
        for row in generate(40, 1)
    ]
    rows[9] = rows[3]
    evaluation = (Problem(source="test.jsonl:1", text=generate(40, 1)[20]["question"]),)
    audit = look(rows, "data.kind=rollouts", "objective.name=grpo", evaluation=evaluation)
    assert found(audit) == {"duplicate": [10], "overlap": [21]}


def test_no_two_rules_have_a_name():
    names = [rule.name for rule in (*ROW_RULES, *RULES_ACROSS)]
    assert len(set(names)) == len(names)
