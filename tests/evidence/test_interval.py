"""Intervals by Student's t."""

import math

import pytest

from evidence.interval import interval
from evidence.results import at_the_end, difference, final, mean_of, overall, values
from megapsft.errors import Refused
from tests.evidence.made import made


def test_three_values():
    found = interval([1, 2, 3])
    assert (found.mean, found.count) == (2, 3)
    assert found.half == pytest.approx(4.303 / math.sqrt(3))  # s = 1
    assert (found.low, found.high) == (2 - found.half, 2 + found.half)


def test_the_interval_is_the_widest_with_two_values():
    assert interval([0, 2]).half == pytest.approx(12.706)


@pytest.mark.parametrize("count", [0, 1, 11])
def test_too_few_and_too_many(count):
    with pytest.raises(Refused, match="seeds"):
        interval(range(count))


def test_a_difference_is_paired_by_seed():
    """What seeds have in common does not count: 0.1 at each of them is known well where the values themselves differ by 0.4."""
    spread = (0.0, 0.4, -0.4)
    results = made({("sft", "in"): spread, ("psft", "in"): [one + 0.1 for one in spread]})
    found = difference(results, "psft", "sft", final("in"))
    assert found.mean == pytest.approx(0.1, abs=0.005)
    assert found.half < 0.02


def test_numbers_of_a_run():
    run = made({("sft", "in"): (0.1, 0, 0)})["sft"].runs[1]
    assert overall(run) == pytest.approx((0.6 + 0.5) / 2, abs=0.005)
    assert final("out")(run) == run.accuracy["out"][2]
    run.curves["entropy"][-1] = 5.0
    assert at_the_end("entropy")(run) == 5.0  # a tenth of ten steps
    assert mean_of("entropy")(run) == pytest.approx(1.4, abs=0.01)
    assert list(values(made(), "sft", overall)) == [1, 2, 3]
