"""avg@n and pass@k against brute force. Not here: who answers and who verifies."""

import itertools
import math
import random
from fractions import Fraction

import pytest

from megapsft.errors import Refused
from megapsft.evaluate.pass_at_k import average_at_n, over_problems, pass_at_k, pass_probability


@pytest.mark.parametrize("n", range(1, 9))
def test_the_share_of_all_subsets(n):
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([1] * right + [0] * (n - right), k))
        assert pass_probability(n, right, k) == sum(map(max, subsets)) / len(subsets)


@pytest.mark.parametrize("p", [Fraction(1, 10), Fraction(1, 2), Fraction(97, 100)])
def test_it_is_unbiased(p):
    n = 12
    for k in range(1, n + 1):
        draws = ((right, math.comb(n, right) * p**right * (1 - p) ** (n - right)) for right in range(n + 1))
        expected = math.fsum(pass_probability(n, right, k) * float(weight) for right, weight in draws)
        assert expected == pytest.approx(float(1 - (1 - p) ** k), rel=1e-12)


def test_it_is_rounded_once_where_a_product_of_floats_loses_digits():
    n = 10**6
    assert pass_probability(n, 1, 1) == 1 / n  # 1 - (1 - 1/n) is off in the tenth digit
    exact = 1 - Fraction(math.comb(n - 3, 7), math.comb(n, 7))
    assert pass_probability(n, 3, 7) == float(exact)
    assert pass_probability(4096, 2048, 1024) == 1.0


def test_avg_is_the_mean_of_means_and_pass_at_1_is_the_same():
    scores = [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0]]
    assert average_at_n(scores).value == pytest.approx((0.5 + 1 + 0) / 3)
    assert pass_at_k(scores, 1) == average_at_n(scores)


def test_partial_scores_count_in_avg_and_are_not_right():
    assert average_at_n([[0.5, 0.99]]).value == pytest.approx(0.745)
    assert pass_at_k([[0.5, 0.99, True]], 3).value == 1.0
    assert pass_at_k([[0.5, 0.99]], 2).value == 0.0


def test_the_examples_of_the_docstrings():
    found = average_at_n([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert (found.value, found.problems) == (0.5, 3)
    assert found.standard_error == pytest.approx(math.sqrt(1 / 12))
    found = pass_at_k([[1, 0, 0, 0], [0, 0, 0, 0]], 2)
    assert (found.value, found.standard_error) == (0.25, 0.25)


def test_the_standard_error_is_that_of_all_bootstraps_over_problems():
    values = [0.1, 0.9, 0.4, 0.4]
    means = [math.fsum(drawn) / 4 for drawn in itertools.product(values, repeat=4)]
    variance = math.fsum((mean - 0.45) ** 2 for mean in means) / len(means)
    assert over_problems(values).standard_error == pytest.approx(math.sqrt(variance * 4 / 3), rel=1e-12)


def test_the_standard_error_covers_the_spread_within_and_between_problems():
    rng = random.Random(0)
    found = []
    for _ in range(2000):  # a benchmark of 25 problems drawn anew, 4 correlated responses each
        chances = [rng.choice((0.1, 0.8)) for _ in range(25)]
        found.append(pass_at_k([[float(rng.random() < chance) for _ in range(4)] for chance in chances], 2))
    mean = math.fsum(one.value for one in found) / len(found)
    spread = math.sqrt(math.fsum((one.value - mean) ** 2 for one in found) / (len(found) - 1))
    claimed = math.sqrt(math.fsum(one.standard_error**2 for one in found) / len(found))
    assert mean == pytest.approx((1 - 0.9**2 + 1 - 0.2**2) / 2, abs=5 * spread / math.sqrt(2000))
    assert claimed == pytest.approx(spread, rel=0.06)


def test_of_one_problem_no_standard_error_is_known():
    assert math.isnan(average_at_n([[1, 0]]).standard_error)


@pytest.mark.parametrize(
    ("scores", "k", "said"),
    [
        ([], 1, "hold no problem"),
        ([[1], []], 1, "problem 1: has no responses"),
        ([[1, math.nan]], 1, "problem 0: has a score that is not finite"),
        ([[1, 0], [1]], 2, "k=2: must lie in 1..1, the responses of problem 1"),
        ([[1, 0]], 0, "k=0: must lie in 1..2"),
    ],
)
def test_refuses_and_says_what_would_be_right(scores, k, said):
    with pytest.raises(Refused) as refused:
        pass_at_k(scores, k)
    assert said in str(refused.value)


@pytest.mark.parametrize(("n", "right", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0), (0, 0, 1)])
def test_counts_that_cannot_be_are_refused(n, right, k):
    with pytest.raises(Refused):
        pass_probability(n, right, k)
