"""Which groups are worth training. Not here: sampling more of them."""

import pytest

from megapsft.rollout.dynamic_sampling import informative


@pytest.mark.parametrize(
    ("metric", "kept"),
    [
        ([[1, 1], [1, 0], [0, 0]], [1]),
        ([[0.1, 0.1, 0.1]], []),  # whose standard deviation is not quite 0 in floating point
        ([[0.5, 0.5 + 1e-9]], [0]),
        ([[1], [0]], [0, 1]),
        ([[]], []),
        ([], []),
    ],
)
def test_groups_with_a_spread_and_groups_of_one(metric, kept):
    assert informative(metric) == kept


@pytest.mark.parametrize(("train_prompts", "kept"), [(1, [1]), (2, [1, 3]), (3, [1, 3, 4]), (9, [1, 3, 4]), (0, [])])
def test_no_more_than_are_wanted_in_order(train_prompts, kept):
    assert informative([[1, 1], [1, 0], [0, 0], [0, 1], [1]], train_prompts) == kept
