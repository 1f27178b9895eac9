"""The form of a response. Not here: workers that are killed (test_pool.py)."""

import pytest

from megapsft.errors import Refused
from megapsft.rewards._base import Part, Response
from megapsft.rewards._pool import Pool
from megapsft.rewards.format import Format

VARIANTS = [{"pattern": r"(a|aa)+b|", "timeout": 1.0}]  # for the contract: exponential on the wrong texts


@pytest.fixture(scope="module")
def pool():
    made = Pool(2)
    yield made
    made.close()


def parts(pool, reward, *texts):
    return reward([Response(prompt="?", text=text, tokens=1, source="a.jsonl:1") for text in texts], pool)


def test_thoughts_and_something_after_them(pool):
    right = ["<think>2 + 2</think> \\boxed{4}", "\n<think>\n\n</think>\n4\n", "<think>a</think><think>b</think> 4"]
    wrong = ["", "4", "<think>2 + 2 4", "<think></think> 4", "<think>2</think>", "<think>2</think> \n", "So <think>2</think> 4"]
    assert parts(pool, Format(), *right) == [Part(1.0)] * len(right)
    assert parts(pool, Format(), *wrong) == [Part(0.0)] * len(wrong)


def test_the_whole_response_is_to_match(pool):
    assert [part.value for part in parts(pool, Format(pattern="a.c"), "abc", "a\nc", "abcd", " abc")] == [1.0, 1.0, 0.0, 0.0]


def test_a_pattern_that_backtracks_for_ever_costs_its_own_response_alone(pool):
    reward = Format(pattern=r"(a|aa)+b", timeout=1.0)
    found = parts(pool, reward, "aab", "a" * 200, "aab", "a" * 200)
    assert found == [Part(1.0), Part(0.0, "timeout"), Part(1.0), Part(0.0, "timeout")]


@pytest.mark.parametrize(
    ("options", "said"),
    [({"pattern": "(<think>"}, "is not a regular expression: missing )"), ({"timeout": 0.0}, "timeout=0.0: must be above 0")],
)
def test_refuses_and_says_what_would_be_right(options, said):
    with pytest.raises(Refused) as refused:
        Format(**options)
    assert said in str(refused.value)
