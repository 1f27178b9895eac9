"""The weighted sum and its metrics."""

import pytest

from megapsft.errors import Refused
from megapsft.rewards._base import Base, Part, Response
from megapsft.rewards._pool import Pool
from megapsft.rewards.registry import build_rewards
from megapsft.rewards.sum import Scored, Sum, summary


class Broken(Base):
    def check(self, pool):
        raise Refused("broken", "cannot be computed", "mend it")


def response(text, tokens=5):
    return Response(prompt="?", text=text, tokens=tokens, source="a.jsonl:1", reference="4")


def test_parts_are_kept_unweighted_and_the_total_is_their_weighted_sum():
    entries = [
        {"name": "math_answer"},
        {"name": "format", "weight": 0.1},
        {"name": "length", "soft_limit": 4, "price": 0.5, "weight": 2.0},
    ]
    with build_rewards(entries) as rewards:
        both, one = rewards([response("<think>2 + 2</think> \\boxed{4}"), response("\\boxed{4}", 4)])
    assert both.parts == {"math_answer": Part(1.0), "format": Part(1.0), "length": Part(-0.5)}
    assert both.total == pytest.approx(1.0 + 0.1 - 1.0)
    assert one.parts == {"math_answer": Part(1.0), "format": Part(0.0), "length": Part(0.0)}
    assert one.total == 1.0


def test_a_weight_of_zero_measures_only():
    with build_rewards([{"name": "length", "soft_limit": 0, "weight": 0}]) as rewards:
        (scored,) = rewards([response("4")])
    assert (scored.total, scored.parts["length"].value) == (0.0, -0.005)


def test_of_nothing_there_is_nothing():
    with build_rewards([{"name": "format"}, {"name": "math_answer"}]) as rewards:
        assert rewards([]) == []


def test_the_summary_counts_each_kind_of_failure():
    scored = [
        Scored(1.1, {"math": Part(1.0), "format": Part(1.0)}),
        Scored(0.0, {"math": Part(0.0, "timeout"), "format": Part(0.0, "timeout")}),
        Scored(0.1, {"math": Part(0.0, "died"), "format": Part(1.0)}),
        Scored(0.0, {"math": Part(0.0, "error"), "format": Part(0.0)}),
    ]
    assert summary(scored) == {
        "reward/math": 0.25,
        "reward/format": 0.5,
        "reward/timeouts": 2.0,
        "reward/deaths": 1.0,
        "reward/errors": 1.0,
    }


def test_what_is_refused_at_the_door_leaves_no_worker():
    pool = Pool(1)
    with pytest.raises(Refused, match="broken"):
        Sum({"broken": Broken()}, pool)
    with pytest.raises(RuntimeError):
        pool.map("builtins:len", [("a",)], 1.0)
