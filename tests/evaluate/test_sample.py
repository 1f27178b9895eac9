"""Asking an engine for what is missing, with one that counts what it is asked. Not here: real engines (test_commands.py)."""

import numpy as np
import pytest

from megapsft.data.chat_template import ChatTemplate
from megapsft.evaluate.benchmark import Problem
from megapsft.evaluate.engine import Opened
from megapsft.evaluate.journal import Journal
from megapsft.evaluate.sample import Unit, fill, rollout_of, units
from megapsft.rollout.base import Request, Rollout, Sampling
from megapsft.rollout.recorded import Recorded
from megapsft.train.rollout_record import rollout_record

SAMPLING = Sampling(max_tokens=8)


class Counting:
    """Answers with the prompt's first token and the number; ends after so many responses, as a kill would."""

    def __init__(self, streams, ends_after=None):
        self.streams, self.ends_after, self.calls = streams, ends_after, []

    def generate(self, requests, sampling, enough=None):
        self.calls.append([(request.prompt_ids, request.number) for request in requests])
        found = [answer(request.prompt_ids, request.number) for request in requests]
        if not self.streams:
            assert enough is None
            return found
        for count, index in enumerate(reversed(range(len(found)))):  # the last is done first
            if count == self.ends_after:
                raise KeyboardInterrupt
            assert not enough(index, found[index])
        return found

    @property
    def asked(self):
        return [request for call in self.calls for request in call]


def answer(prompt_ids, number):
    return Rollout(prompt_ids=prompt_ids, response_ids=(prompt_ids[0], number + 1), rollout_logprobs=(-0.1, -2.0),
                   finish_reason="stop", weight_version=0)  # fmt: skip


def problem(*ids):
    return Problem(prompt="?", token_ids=ids, reference="5", row={}, source="a.jsonl:1")


PROBLEMS = [problem(10), problem(20), problem(10), problem(30)]


def record(unit, rollouts):
    ids = [list(rollout.response_ids) for rollout in rollouts]
    return {"row": unit.row, "number": unit.number, "rollouts": ids}


def run(path, wanted, engine, batch_size=None):
    with Journal(path, {}) as journal:
        fill(journal, PROBLEMS, wanted, Opened(engine, engine.streams, batch_size), SAMPLING, record)
        return list(journal.read())


def test_units_count_on_where_rows_have_the_same_prompt():
    assert units(PROBLEMS, 4, 2)[:6] == [
        Unit(0, 0, 2), Unit(0, 2, 2), Unit(1, 0, 2), Unit(1, 2, 2), Unit(2, 4, 2), Unit(2, 6, 2),
    ]  # fmt: skip
    assert [unit.number for unit in units(PROBLEMS, 2, 1) if unit.row in (0, 2)] == [0, 1, 2, 3]


@pytest.mark.parametrize(("size", "calls"), [(4, [4, 4]), (5, [4, 4]), (1, [2, 2, 2, 2]), (100, [8])])
def test_an_engine_in_the_process_gets_batches_of_whole_units(size, calls, tmp_path):
    engine = Counting(streams=False)
    found = run(tmp_path / "a.jsonl", units(PROBLEMS, 2, 2), engine, size)
    assert [len(call) for call in engine.calls] == calls
    assert [one["rollouts"] for one in found] == [[[10, 1], [10, 2]], [[20, 1], [20, 2]], [[10, 3], [10, 4]], [[30, 1], [30, 2]]]


@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("ends_after", [0, 1, 5, 11])
def test_what_came_before_the_end_is_not_asked_for_again(each, ends_after, tmp_path):
    path, wanted = tmp_path / "a.jsonl", units(PROBLEMS, 3, each)
    with pytest.raises(KeyboardInterrupt):
        run(path, wanted, Counting(True, ends_after))
    written = path.read_text().splitlines()
    assert len(written) == ends_after // each
    engine = Counting(True)
    found = run(path, wanted, engine)
    assert path.read_text().splitlines()[: len(written)] == written
    assert len(engine.asked) == 12 - len(written) * each
    assert sorted(ids for one in found for ids in one["rollouts"]) == sorted(
        [prompt, number] for prompt, most in ((10, 6), (20, 3), (30, 3)) for number in range(1, most + 1)
    )
    nothing = Counting(True)
    run(path, wanted, nothing)
    assert nothing.calls == []


def test_batches_are_cut_as_if_nothing_were_there(tmp_path):
    path, wanted = tmp_path / "a.jsonl", units(PROBLEMS, 2, 1)
    with Journal(path, {}) as journal:
        for unit in (wanted[0], wanted[1], wanted[2]):
            journal.write(record(unit, [answer((0,), 0)]))
    engine = Counting(False)
    run(path, wanted, engine, 2)
    assert engine.calls == [[((20,), 1)], [((10,), 2), ((10,), 3)], [((30,), 0), ((30,), 1)]]


def test_a_record_says_the_words_and_gives_the_rollout_back_exactly(tiny_models, tmp_path):
    template = ChatTemplate.load(tiny_models("qwen3"))
    end = template.terminator_id
    words = template.tokenizer("so 5", add_special_tokens=False)["input_ids"]
    logprobs = tuple(np.random.default_rng(0).normal(-1, 1, len(words) + 1).astype(np.float32).tolist())
    rollout = Rollout(prompt_ids=(1, 2), response_ids=(*words, end), rollout_logprobs=logprobs, finish_reason="stop",
                      weight_version=3)  # fmt: skip
    found = rollout_record(PROBLEMS[0], rollout, template, logprobs=True)
    assert found["response"] == "so 5"
    assert max(len(repr(x)) for x in found["logprobs"]) <= 14
    with Journal(tmp_path / "a.jsonl", {}) as journal:
        journal.write({"row": 0, "number": 0, "prompt_token_ids": [1, 2], "rollouts": [found]})
    (back,) = Recorded(tmp_path / "a.jsonl").generate([Request(prompt_ids=(1, 2))], Sampling(max_tokens=99))
    assert back == rollout
    short = rollout_record(PROBLEMS[0], rollout, template, logprobs=False)
    assert "logprobs" not in short
    assert rollout_of(short, (1, 2)).response_ids == rollout.response_ids
