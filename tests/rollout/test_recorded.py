"""Recorded rollouts as an engine. Not here: that they are trained on as they are (tests/data/test_rollouts.py)."""

import json

import pytest

from megapsft.errors import Refused
from megapsft.rollout.base import Request, Rollout, Sampling
from megapsft.rollout.recorded import Recorded

FIRST = {"token_ids": [7, 8, 2], "logprobs": [-0.1, -0.25, -3.0], "finish_reason": "stop", "weight_version": 4, "reward": 1.0}
SECOND = {"token_ids": [9, 9, 9, 9], "logprobs": [-1.0, -1.0, -1.0, -1.0], "finish_reason": "length"}
ROW = {"prompt_token_ids": [5, 6], "rollouts": [FIRST, SECOND], "question": "?"}


@pytest.fixture
def recorded(tmp_path):
    def make(*rows):
        path = tmp_path / "rollouts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Recorded(path)

    return make


def ask(*numbers, prompt=(5, 6)):
    return [Request(prompt_ids=prompt, number=number) for number in numbers]


def changed(**changes):
    return ROW | {"rollouts": [{**FIRST, **changes}]}


def test_each_request_gets_the_response_of_its_number_in_the_order_of_the_requests(recorded):
    second, first = recorded(ROW).generate(ask(1, 0), Sampling(max_tokens=4, stop_token_ids=(2,)))
    assert (first.prompt_ids, first.response_ids, first.finish_reason, first.weight_version) == ((5, 6), (7, 8, 2), "stop", 4)
    assert first.rollout_logprobs == pytest.approx((-0.1, -0.25, -3.0), rel=1e-7)
    assert (second.response_ids, second.finish_reason, second.weight_version) == ((9, 9, 9, 9), "length", 0)


def test_rows_of_one_prompt_go_on_counting_and_numbers_may_be_said(recorded):
    engine = recorded(ROW, {"prompt_token_ids": [1], "rollouts": [SECOND]}, changed(weight_version=9))
    assert engine.generate(ask(2), Sampling(max_tokens=4))[0].weight_version == 9
    engine = recorded(changed(weight_version=9) | {"number": 2}, ROW | {"number": 0})
    assert [r.weight_version for r in engine.generate(ask(0, 2), Sampling(max_tokens=3))] == [4, 9]


def test_limits_cut_a_response_as_they_would_have_cut_its_sampling(recorded):
    engine = recorded(ROW)
    (found,) = engine.generate(ask(0), Sampling(max_tokens=2))
    assert (found.response_ids, found.finish_reason, len(found.rollout_logprobs)) == ((7, 8), "length", 2)
    (found,) = engine.generate(ask(0), Sampling(max_tokens=3, stop_token_ids=(8,)))
    assert (found.response_ids, found.finish_reason) == ((7, 8), "stop")
    (found,) = engine.generate(ask(1), Sampling(max_tokens=4, stop_token_ids=(9,)))
    assert (found.response_ids, found.finish_reason) == ((9,), "stop")


def test_new_weights_do_not_change_what_was_recorded(recorded):
    engine = recorded(ROW)
    engine.load_weights(iter(()), 77)
    assert engine.generate(ask(0), Sampling(max_tokens=3))[0].weight_version == 4


def test_once_there_is_enough_the_rest_is_aborted(recorded):
    told = []

    def enough(index, rollout):
        told.append((index, rollout.response_ids))
        return True

    begun = Rollout(prompt_ids=(5, 6), response_ids=(7,), rollout_logprobs=(-0.1,), finish_reason="abort", weight_version=3)
    requests = [*ask(1, 0), Request(prompt_ids=(5, 6), number=0, partial=begun)]
    found = recorded(ROW).generate(requests, Sampling(max_tokens=4), enough)
    assert told == [(0, (9, 9, 9, 9))]
    assert [rollout.finish_reason for rollout in found] == ["length", "abort", "abort"]
    assert (found[1].response_ids, found[1].rollout_logprobs, found[2]) == ((), (), begun)


def test_a_partial_response_is_gone_on_with_where_it_is_the_beginning(recorded):
    def gone_on_with(*ids):
        begun = Rollout(prompt_ids=(5, 6), response_ids=ids, rollout_logprobs=(0.0,) * len(ids), finish_reason="abort",
                        weight_version=0)  # fmt: skip
        return recorded(ROW).generate([Request(prompt_ids=(5, 6), number=0, partial=begun)], Sampling(max_tokens=3))

    assert gone_on_with(7, 8)[0].response_ids == (7, 8, 2)
    with pytest.raises(Refused, match="begins otherwise"):
        gone_on_with(7, 9)


@pytest.mark.parametrize(
    ("requests", "max_tokens", "said"),
    [
        (ask(2), 4, "response number 2: holds 2 responses to this prompt"),
        (ask(0, prompt=(6, 5)), 4, "does not hold this prompt"),
        (ask(1), 5, "max_tokens=5: was cut after 4 tokens; use max_tokens=4"),
    ],
)
def test_what_was_not_recorded_is_refused(requests, max_tokens, said, recorded):
    with pytest.raises(Refused) as refused:
        recorded(ROW).generate(requests, Sampling(max_tokens=max_tokens))
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt_token_ids": [1]}, ":2: has no list of rollouts"),
        ({"rollouts": [FIRST]}, "prompt_token_ids: is not a list of token ids"),
        (changed(token_ids=[]), "rollout 1: token_ids: is not a list of token ids"),
        (changed(logprobs=[-0.1]), "rollout 1: logprobs: are not 3 numbers"),
        (changed(logprobs=None), "rollout 1: logprobs: are not 3 numbers"),
        (changed(finish_reason="abort"), "finish_reason='abort': is not known"),
        (changed(weight_version=-1), "weight_version=-1: is not an integer"),
        (ROW | {"number": 1}, "number 1: is there twice for its prompt"),
    ],
)
def test_lines_that_are_no_recording_are_refused(row, said, recorded):
    with pytest.raises(Refused) as refused:
        recorded(ROW, row)
    assert said in str(refused.value)


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(Refused, match="is not a file"):
        Recorded(tmp_path / "none.jsonl")
    (tmp_path / "torn.jsonl").write_text('{"prompt')
    with pytest.raises(Refused, match="torn.jsonl:1: is not a line of JSON"):
        Recorded(tmp_path / "torn.jsonl")
