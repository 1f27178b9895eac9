"""Problems from files. Not here: what is wrong with a file or a prompt as such (tests/data/test_rows.py)."""

import json

import pytest

from megapsft.data.chat_template import ChatTemplate
from megapsft.errors import Refused
from megapsft.evaluate.benchmark import load_benchmark

TURNS = [{"role": "user", "content": "2 + 3?"}]


@pytest.fixture
def load(tiny_models, tmp_path):
    def load(*rows, **options):
        path = tmp_path / "mine.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_benchmark(path, ChatTemplate.load(tiny_models("qwen3")), **options)

    return load


@pytest.mark.parametrize(
    ("row", "prompt", "reference"),
    [
        ({"question": "2 + 3?", "answer": "2 + 3 = 5\n#### 5"}, "2 + 3?", "2 + 3 = 5\n#### 5"),  # GSM8K
        ({"problem": "2 + 3?", "solution": "It is 5.", "answer": "5", "level": 1}, "2 + 3?", "5"),  # MATH-500
        ({"problem": "2 + 3?", "answer": 5}, "2 + 3?", "5"),
        ({"prompt": TURNS, "ground_truth": 1.5}, TURNS, "1.5"),
    ],
)
def test_columns_are_found_by_their_usual_names(row, prompt, reference, load):
    found = load(row)
    (problem,) = found.problems
    assert (found.name, problem.prompt, problem.reference, problem.row) == ("mine", prompt, reference, row)
    assert problem.source.endswith("mine.jsonl:1")


def test_prompts_are_tokenised_as_a_user_turn_behind_the_system_prompt(load, tiny_models):
    template = ChatTemplate.load(tiny_models("qwen3"))
    found = load({"question": "2 + 3?", "answer": "5"}, {"question": "4 + 4?", "answer": "8"}, system_prompt="Be brief.")
    for problem, text in zip(found.problems, ("2 + 3?", "4 + 4?"), strict=True):
        ids, length = template.encode(text, "x", "Be brief.")
        assert problem.token_ids == tuple(ids[:length])
    assert found.longest_prompt == max(len(problem.token_ids) for problem in found.problems)


def test_columns_may_be_named_and_problems_limited(load):
    rows = [{"a": "2 + 3?", "problem": "no", "b": "5", "answer": "no"}, {"a": "4 + 4?", "b": "8"}]
    found = load(*rows, prompt_column="a", reference_column="b", limit=1)
    assert [(problem.prompt, problem.reference) for problem in found.problems] == [("2 + 3?", "5")]


def test_only_a_column_that_all_rows_fill_is_taken(load):
    found = load({"problem": "1?", "question": None, "answer": "1"}, {"problem": "2?", "question": "?", "answer": "2"})
    assert [problem.prompt for problem in found.problems] == ["1?", "2?"]


def test_without_a_need_there_is_no_reference(load):
    assert load({"prompt": "2 + 3?"}, needs_reference=False).problems[0].reference is None


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([{"text": "?", "answer": "5"}], {}, "name it with --prompt-column; its columns are text, answer"),
        ([{"problem": "?", "label": "5"}], {}, "name it with --reference-column; its columns are problem, label"),
        ([{"problem": "?", "answer": "5"}, {"problem": "?"}], {}, "has no column for the reference that all rows fill"),
        ([{"problem": "?"}], {"prompt_column": "b"}, "--prompt-column b: is not in every row of"),
        ([{"problem": "?", "answer": ["5"]}], {}, "column 'answer': is a list"),
        ([{"problem": "?", "answer": True}], {}, "column 'answer': is a bool"),
        ([{"problem": "?", "answer": " "}], {}, "column 'answer': is blank"),
        ([{"problem": "?", "answer": "5"}], {"limit": 0}, "limit=0: must be 1 or more"),
    ],
)
def test_refuses_and_says_what_would_be_right(rows, options, said, load):
    with pytest.raises(Refused) as refused:
        load(*rows, **options)
    assert said in str(refused.value)
