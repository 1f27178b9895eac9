"""Soft overlong punishment. More values: tests/oracles."""

import pytest

from megapsft.errors import Refused
from megapsft.rewards._base import Response
from megapsft.rewards.overlong import Overlong, overlong_penalty

REQUIRED = {"max_response_length": 10, "buffer": 4}  # for the contract
VARIANTS = [{"factor": 0.5}]


@pytest.mark.parametrize(
    ("length", "factor", "penalty"),
    [(1, 1.0, 0.0), (6, 1.0, 0.0), (7, 1.0, -0.25), (10, 1.0, -1.0), (10, 0.5, -0.5), (8, 0.0, 0.0), (12, 1.0, -1.5)],
)
def test_a_straight_line_through_the_buffer(length, factor, penalty):
    assert overlong_penalty(length, 10, 4, factor) == penalty


def test_a_buffer_as_long_as_the_response_starts_at_once():
    assert overlong_penalty(1, 10, 10) == -0.1


@pytest.mark.parametrize(
    ("buffer", "factor", "said"),
    [(0, 1.0, "buffer=0: must lie in 1..max_response_length=10"), (11, 1.0, "buffer=11"), (4, -1.0, "factor=-1.0")],
)
def test_refuses_and_says_what_would_be_right(buffer, factor, said):
    with pytest.raises(Refused) as refused:
        overlong_penalty(5, 10, buffer, factor)
    assert said in str(refused.value)


def test_as_a_reward_it_counts_the_tokens_of_the_response():
    responses = [Response(prompt="?", text="text", tokens=tokens, source="a.jsonl:1") for tokens in (6, 7, 10)]
    parts = Overlong(**REQUIRED, factor=2.0)(responses, None)
    assert [part.value for part in parts] == [0.0, -0.5, -2.0]
    with pytest.raises(Refused, match="buffer=11"):
        Overlong(max_response_length=10, buffer=11)
