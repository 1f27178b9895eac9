"""Rewards by name. Not here: the user's own (test_user.py), and what they compute."""

import pytest

from megapsft.errors import Refused
from megapsft.rewards.format import Format
from megapsft.rewards.length import Length
from megapsft.rewards.registry import build_reward, build_rewards, reward_names


def test_the_files_are_the_list():
    assert {"format", "length", "math_answer", "overlong"} <= set(reward_names())
    assert not {"registry", "answer", "sum"} & set(reward_names())


def test_builds_with_defaults_and_with_options():
    assert build_reward({"name": "length"}) == ("length", Length())
    assert build_reward({"name": "length", "price": "1e-2"}) == ("length", Length(price=0.01))  # YAML 1.1 reads 1e-2 as a string
    assert build_reward({"name": "format", "label": "tags", "weight": 0.1}) == ("tags", Format(label="tags", weight=0.1))


def test_leaves_the_config_as_it_is():
    entry = {"name": "length", "weight": 0.5}
    build_reward(entry)
    assert entry == {"name": "length", "weight": 0.5}


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({}, "has no name; give one of format, length, math_answer, overlong"),
        ({"name": ["format"]}, "has no name"),
        ({"name": "fromat"}, "did you mean 'format'"),
        ({"name": "math"}, "did you mean 'math_answer'"),
        ({"name": "registry"}, "is not known"),
        ({"name": "_user"}, "is not known"),
        ({"name": "length", "soft_limt": 3}, "reward length: soft_limt: is not an option; did you mean 'soft_limit'"),
        ({"name": "length", "soft_limit": "long"}, "reward length: soft_limit='long'"),
        ({"name": "length", "soft_limit": -1}, "reward length: soft_limit=-1: must be 0 or more"),
        ({"name": "length", "weight": float("nan")}, "reward length: weight=nan"),
        ({"name": "overlong", "buffer": 3}, "reward overlong: max_response_length: is missing"),
        ({"name": "length", "label": "mean"}, "label='mean' of reward length: must be a word, and not one of deaths"),
        ({"name": "length", "label": "a/b"}, "must be a word"),
        ({"name": "tests/rewards/workers.py:length", "weight": "much"}, "weight='much'"),
    ],
)
def test_refuses_and_says_what_would_be_right(entry, said):
    with pytest.raises(Refused) as refused:
        build_reward(entry)
    assert said in str(refused.value)


def test_one_reward_at_least_and_each_under_its_own_label():
    with pytest.raises(Refused, match="names none; name one at least: format"):
        build_rewards([])
    with pytest.raises(Refused, match="length: is there twice"):
        build_rewards([{"name": "length"}, {"name": "length", "soft_limit": 3}])
    with build_rewards([{"name": "length"}, {"name": "length", "label": "short"}]) as rewards:
        assert list(rewards.rewards) == ["length", "short"]
