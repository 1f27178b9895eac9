"""Not tested here: selection over a file (test_rollouts)."""

import pytest

from megapsft.data.select import first_of_each, raft, rft


@pytest.mark.parametrize(
    ("rewards", "threshold", "kept"),
    [
        ([1, 0, 1], 1.0, [1, 0, 1]),
        ([0.2, 0.5, 0.49], 0.5, [0, 1, 0]),
        ([0, 0], 1.0, [0, 0]),
        ([], 1.0, []),
        ([-1, -2], -1.0, [1, 0]),
    ],
)
def test_rft_keeps_all_that_reach_the_threshold(rewards, threshold, kept):
    assert rft(rewards, threshold) == [bool(flag) for flag in kept]


@pytest.mark.parametrize(("rewards", "kept"), [([0.2, 0.9], [0, 1]), ([0.4, 0.4, 0.1], [1, 0, 0]), ([0, 0], [1, 0]), ([-3], [1])])
def test_raft_keeps_the_first_of_the_best(rewards, kept):
    assert raft(rewards) == [bool(flag) for flag in kept]


def test_a_response_that_was_not_kept_hides_no_other():
    assert first_of_each([False, True, True, True], ["a", "a", "b", "a"]) == [False, True, True, False]
