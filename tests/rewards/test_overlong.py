"""Soft overlong punishment. More values: tests/oracles."""

import pytest

from megapsft.errors import Refused
from megapsft.rewards.overlong import overlong_penalty


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
