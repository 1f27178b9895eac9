"""What a step takes out of the stream of prompts: nothing twice, nothing lost. The engine here finishes in any order we like."""

from __future__ import annotations

import random

import pytest

from megapsft.rollout.base import Rollout, Sampling
from megapsft.rollout.collect import Collected, Stream, collect, resumed

SAMPLING = Sampling(max_tokens=8)
EMPTY = Collected(answered=(), stream=Stream())


def prompt_of(draw):
    return (draw, draw + 1)


class Shuffled:
    """Finishes requests in a random order; what is aborted has some tokens, or none."""

    def __init__(self, seed=0, version=0):
        self.rng, self.version, self.asked = random.Random(seed), version, []

    def generate(self, requests, sampling, enough=None):
        self.asked += requests
        order, stopped = list(range(len(requests))), False
        self.rng.shuffle(order)
        found = {}
        for index in order:
            request = requests[index]
            before = request.partial
            tokens = () if before is None else before.response_ids
            versions = [self.version] + ([] if before is None else [before.weight_version])
            length = self.rng.randint(0, 3) if stopped else 4
            tokens = (*tokens, *(request.number for _ in range(length)))
            found[index] = Rollout(
                prompt_ids=request.prompt_ids,
                response_ids=tokens,
                rollout_logprobs=(-1.0,) * len(tokens),
                finish_reason="abort" if stopped else "stop",
                weight_version=min(versions),
            )
            if not stopped and enough is not None:
                stopped = enough(index, found[index])
        return [found[index] for index in range(len(requests))]


def test_without_oversampling_a_step_is_the_next_prompts():
    engine = Shuffled()
    first = collect(engine, prompt_of, EMPTY, groups=3, n=2, sampling=SAMPLING, oldest=0)
    second = collect(engine, prompt_of, first, groups=3, n=2, sampling=SAMPLING, oldest=0)
    assert [one.draw for one in first.answered] == [0, 1, 2]
    assert [one.draw for one in second.answered] == [3, 4, 5]
    assert second.stream == Stream(drawn=6)
    for one in (*first.answered, *second.answered):
        assert len(one.rollouts) == 2
        assert all(rollout.prompt_ids == prompt_of(one.draw) for rollout in one.rollouts)
    assert len({request.number for request in engine.asked}) == 12  # no two share a seed


@pytest.mark.parametrize("oldest_behind", [0, 1, 100])
@pytest.mark.parametrize("seed", range(5))
def test_every_draw_is_trained_once_or_waits(seed, oldest_behind):
    engine, before, trained = Shuffled(seed), EMPTY, []
    restarted = aborted = 0
    for step in range(30):
        engine.version = step
        oldest = step - oldest_behind
        before = collect(engine, prompt_of, before, groups=4, n=3, sampling=SAMPLING, oldest=oldest, oversample=1.5)
        assert len(before.answered) == 4
        assert set(before.partial) == set(before.stream.waiting)
        for one in before.answered:
            assert len(one.rollouts) == 3
            for rollout in one.rollouts:
                assert rollout.finish_reason == "stop"
                assert rollout.weight_version >= oldest
                assert rollout.prompt_ids == prompt_of(one.draw)
        trained += [one.draw for one in before.answered]
        restarted += before.restarted
        aborted += before.aborted
    assert len(trained) == len(set(trained))
    assert sorted([*trained, *before.stream.waiting]) == list(range(before.stream.drawn))
    assert aborted > 0
    assert (restarted > 0) == (oldest_behind < 100)


def test_an_aborted_rollout_is_gone_on_with():
    engine, before = Shuffled(3), EMPTY
    partials = []
    for _ in range(6):
        before = collect(engine, prompt_of, before, groups=2, n=2, sampling=SAMPLING, oldest=0, oversample=2.0)
        partials += [request.partial for request in engine.asked if request.partial is not None]
    assert any(partial.response_ids for partial in partials)
    assert all(partial.finish_reason == "abort" for partial in partials)


def test_after_a_resume_what_waits_is_sampled_anew():
    engine = Shuffled(1)
    before = collect(engine, prompt_of, EMPTY, groups=2, n=2, sampling=SAMPLING, oldest=0, oversample=2.0)
    assert before.stream.waiting
    again = resumed(before.stream, 2)
    engine.asked.clear()
    after = collect(engine, prompt_of, again, groups=2, n=2, sampling=SAMPLING, oldest=0)
    assert [one.draw for one in after.answered] == list(before.stream.waiting)[:2]
    assert all(request.partial is None for request in engine.asked)
    assert after.restarted == 0


def test_groups_that_teach_nothing_are_replaced():
    engine = Shuffled()
    found = collect(
        engine,
        prompt_of,
        EMPTY,
        groups=4,
        n=2,
        sampling=SAMPLING,
        oldest=0,
        informative=lambda whole: [one.draw % 3 == 0 for one in whole],
        rounds=20,
    )
    assert [one.draw for one in found.answered] == [0, 3, 6, 9]
    assert found.discarded + len(found.answered) == found.stream.drawn
    assert 1 < found.rounds < 20


def test_rounds_end_where_nothing_teaches():
    found = collect(
        Shuffled(),
        prompt_of,
        EMPTY,
        groups=4,
        n=2,
        sampling=SAMPLING,
        oldest=0,
        informative=lambda whole: [False] * len(whole),
        rounds=3,
    )
    assert found.answered == ()
    assert found.rounds == 3
    assert found.discarded == 12
    assert found.stream == Stream(drawn=12)
