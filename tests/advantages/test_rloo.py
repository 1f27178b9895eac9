"""Leave-one-out advantages."""

import numpy as np
import pytest

from megapsft.advantages.rloo import rloo_advantages


def test_against_the_mean_of_the_others():
    rewards, groups = np.array([1.0, 0.5, 0.0, 4.0, 0.0]), np.array([0, 1, 0, 1, 0])
    np.testing.assert_allclose(rloo_advantages(rewards, groups), [1.0, -3.5, -0.5, 3.5, -0.5])


def test_equal_rewards_are_an_advantage_of_zero_exactly():
    assert rloo_advantages(np.full(3, 0.1), np.zeros(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("singleton", "expected"), [("raw", 2.0), ("zero", 0.0)])
def test_a_group_of_one(singleton, expected):
    assert rloo_advantages(np.array([2.0]), np.array([0]), singleton).tolist() == [expected]
