"""Advantages within a group. Not here: how a step asks for them (tests/advantages/test_registry.py)."""

import numpy as np
import pytest

from megapsft.advantages.group import group_advantages


def test_against_the_mean_and_the_unbiased_standard_deviation():
    rewards = np.array([1.0, 0.0, 0.0, 1.0, 0.0, 0.5])
    groups = np.array([7, 7, 7, 7, 3, 3])
    std = np.sqrt(1 / 3)
    expected = [0.5 / (std + 1e-6), -0.5 / (std + 1e-6)] * 2
    found = group_advantages(rewards, groups)
    np.testing.assert_allclose(found[[0, 1, 3, 2]], expected, rtol=1e-12)
    np.testing.assert_allclose(found[4:], np.array([-0.25, 0.25]) / (0.25 * np.sqrt(2) + 1e-6), rtol=1e-12)
    np.testing.assert_allclose(group_advantages(rewards, groups, norm_by_std=False), [0.5, -0.5, -0.5, 0.5, -0.25, 0.25])


def test_eps_is_an_option():
    found = group_advantages(np.array([1.0, 0.0]), np.array([0, 0]), eps=0.1)
    np.testing.assert_allclose(found, np.array([0.5, -0.5]) / (np.sqrt(0.5) + 0.1))


def test_members_need_not_be_neighbours():
    rewards, groups = np.array([1.0, 5.0, 0.0, 9.0]), np.array([1, 0, 1, 0])
    order = np.argsort(groups, kind="stable")
    np.testing.assert_array_equal(group_advantages(rewards, groups)[order], group_advantages(rewards[order], groups[order]))
    np.testing.assert_allclose(group_advantages(rewards, groups, norm_by_std=False), [0.5, -2, -0.5, 2])


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -0.7])
def test_equal_rewards_are_an_advantage_of_zero_exactly(reward):
    found = group_advantages(np.full(3, reward), np.zeros(3))  # the mean of three times 0.1 is not 0.1
    assert found.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 2 / (1 + 1e-6)), ({"norm_by_std": False}, 2.0), ({"singleton": "zero"}, 0.0), ({"eps": 1.0}, 1.0)],
)
def test_a_group_of_one(options, expected):
    assert group_advantages(np.array([2.0, 1.0, 1.0]), np.array([4, 5, 5]), **options).tolist() == [expected, 0, 0]


def test_of_nothing_is_nothing():
    assert group_advantages(np.array([]), np.array([])).tolist() == []
