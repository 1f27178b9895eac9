"""Scores of responses and their summary, with the real reward. Not here: avg@n and pass@k as such (test_pass_at_k.py)."""

import math

import pytest

from megapsft.data.chat_template import ChatTemplate
from megapsft.errors import Refused
from megapsft.evaluate.benchmark import Problem
from megapsft.evaluate.score import score, summarise
from megapsft.rewards.registry import build_rewards
from megapsft.rollout.base import Rollout


@pytest.fixture(scope="module")
def template(tiny_models):
    return ChatTemplate.load(tiny_models("qwen3"))


@pytest.fixture(scope="module")
def rewards():
    with build_rewards([{"name": "math_answer"}], workers=1) as rewards:
        yield rewards


@pytest.fixture
def answered(template):
    def answered(text, finish_reason="stop"):
        ids = template.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += [template.terminator_id] if finish_reason == "stop" else []
        return Rollout(prompt_ids=(1,), response_ids=tuple(ids), rollout_logprobs=(), finish_reason=finish_reason,
                       weight_version=0)  # fmt: skip

    return answered


def problem(reference):
    return Problem(prompt="?", token_ids=(1,), reference=reference, row={}, source="a.jsonl:1")


def test_scores_lengths_and_what_was_cut(template, rewards, answered):
    right, wrong, cut = answered(r"so \boxed{5}"), answered("#### 6"), answered(r"so \boxed{5", "length")
    half = answered(r"\boxed{0.5}")
    problems = [problem("2 + 3 = 5\n#### 5"), problem(r"\frac{1}{2}")]
    found = score("mine", problems, [[right, wrong], [half, cut]], template, rewards)
    assert found.scores == ((1.0, 0.0), (1.0, 0.0))
    assert found.lengths == tuple(tuple(len(r.response_ids) for r in row) for row in ([right, wrong], [half, cut]))
    assert found.unfinished == ((False, False), (False, True))
    assert found.failures == ((False, False), (False, False))
    summary = summarise(found, (1, 2))
    assert summary == {
        "evaluate/mine/avg": 0.5,
        "evaluate/mine/avg_se": 0.0,
        "evaluate/mine/pass@1": 0.5,
        "evaluate/mine/pass@1_se": 0.0,
        "evaluate/mine/pass@2": 1.0,
        "evaluate/mine/pass@2_se": 0.0,
        "evaluate/mine/length": pytest.approx(sum(map(sum, found.lengths)) / 4),
        "evaluate/mine/unfinished": 0.25,
        "evaluate/mine/failures": 0.0,
    }


def test_pass_at_k_goes_as_far_as_there_are_responses(template, rewards, answered):
    found = score("mine", [problem("5")], [[answered("#### 5")] * 8], template, rewards)
    keys = [key.rpartition("/")[2] for key in summarise(found)]
    assert [key for key in keys if key.startswith("pass@")] == ["pass@1", "pass@1_se", "pass@8", "pass@8_se"]
    assert math.isnan(summarise(found)["evaluate/mine/avg_se"])  # of one problem


def test_a_verifier_that_fails_counts_as_wrong_and_is_counted(template, answered, tmp_path):
    own = tmp_path / "own.py"
    own.write_text("import os\n\ndef reward(prompt, response, row):\n    return 1.0 if 'good' in response else os._exit(1)\n")
    with build_rewards([{"name": str(own)}], workers=1) as rewards:
        found = score("mine", [problem(None)], [[answered("good"), answered("bad")]], template, rewards)
    assert (found.scores, found.failures) == (((1.0, 0.0),), ((False, True),))
    assert summarise(found)["evaluate/mine/failures"] == 1.0


def test_a_problem_without_responses_is_refused(template, rewards):
    with pytest.raises(Refused, match="has no responses"):
        score("mine", [problem("5")], [[]], template, rewards)
