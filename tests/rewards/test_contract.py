"""What every reward owes, whichever it is; a new file in `megapsft/rewards` is tested here without being named.

Its test file may list VARIANTS, options beside the defaults, which are then held to the same, on top of what is REQUIRED where
there is no default. Not here: values.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import random
from pathlib import Path
from typing import Any

import pytest

from megapsft.errors import Refused
from megapsft.rewards._base import Base, Response
from megapsft.rewards._pool import Pool
from megapsft.rewards.registry import build_reward, reward_names


def variants(name: str) -> list[dict[str, Any]]:
    """The defaults, and what the reward's own test adds."""
    path = Path(__file__).with_name(f"test_{name}.py")
    if not path.is_file():
        return [{}]
    spec = importlib.util.spec_from_file_location(f"variants_of_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    required = getattr(module, "REQUIRED", {})
    return [required | options for options in [{}, *getattr(module, "VARIANTS", [])]]


REWARDS = [
    pytest.param(build_reward({"name": name} | options)[1], id="-".join([name, *map(str, options.values())]))
    for name in reward_names()
    for options in variants(name)
]
over_all = pytest.mark.parametrize("reward", REWARDS)

TEXTS = (
    "", " ", "4", "\\boxed{4}", "#### 4", "<think>2 + 2</think> \\boxed{\\frac{8}{2}}", "\\boxed{5}", "<think>", "\0", "\ud800",
    "\\boxed{4", "aab", "四", "a\n" * 50, "\\boxed{x}",
)  # fmt: skip


def response(text: str, **fields: Any) -> Response:
    return Response(prompt="2 + 2?", text=text, source="a.jsonl:3", **{"tokens": len(text) + 1, "reference": "4"} | fields)


@pytest.fixture(scope="module")
def pool():
    made = Pool(2)
    yield made
    made.close()


def values(reward: Base, responses: list[Response], pool: Pool) -> list[float]:
    return [part.value for part in reward(responses, pool)]


@over_all
def test_a_finite_float_for_every_response(reward, pool):
    reward.check(pool)
    found = values(reward, [response(text) for text in TEXTS], pool)
    assert len(found) == len(TEXTS)
    assert all(type(value) is float and math.isfinite(value) for value in found)


@over_all
def test_the_same_alone_again_and_in_any_order(reward, pool):
    responses = [response(text) for text in TEXTS]
    found = values(reward, responses, pool)
    assert values(reward, responses, pool) == found
    assert [value for one in responses for value in values(reward, [one], pool)] == found
    order = random.Random(0).sample(range(len(TEXTS)), len(TEXTS))
    assert values(reward, [responses[i] for i in order], pool) == [found[i] for i in order]


@over_all
def test_it_can_tell_responses_apart(reward, pool):
    lengths = [response(text, tokens=tokens) for text in TEXTS for tokens in (1, 8, 5000)]
    assert len(set(values(reward, lengths, pool))) > 1


@over_all
def test_a_megabyte_of_anything(reward, pool):
    long = [piece * (1_000_000 // len(piece)) for piece in ("a", "\\", "{", "(", "\\boxed{", "<think>", "\n", "9")]
    long += [f"\\boxed{{{text}}}" for text in long] + ["<think>" + text + "</think>" for text in long]
    parts = reward([response(text) for text in [*long, "\\boxed{4}"]], pool)
    assert all(math.isfinite(part.value) for part in parts)
    assert all(part.value <= 0 for part in parts if part.failure)
    assert parts[-1] == reward([response("\\boxed{4}")], pool)[0]


@over_all
@pytest.mark.parametrize("reference", [None, "", " "])
def test_a_missing_reference_is_refused_or_not_needed(reward, reference, pool):
    responses = [response("\\boxed{4}", reference=reference)]
    if reward.needs_reference:
        with pytest.raises(Refused, match=r"a\.jsonl:3: has no reference answer"):
            reward(responses, pool)
    else:
        assert values(reward, responses, pool) == values(reward, [response("\\boxed{4}")], pool)


@over_all
def test_of_nothing_there_is_nothing(reward, pool):
    assert reward([], pool) == []


@over_all
@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(reward, weight):
    with pytest.raises(Refused, match="weight="):
        dataclasses.replace(reward, weight=weight)
