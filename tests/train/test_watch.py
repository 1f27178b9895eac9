"""Degenerate cases said aloud while a run goes on. Those known beforehand are notes of the plan (tests/test_errors.py)."""

from __future__ import annotations

from megapsft.config import OptimizerConfig
from megapsft.objectives.registry import build_objective
from megapsft.train.phases import Phase
from megapsft.train.watch import STEPS_WITHOUT_CLIP, Watch


def phase(**options) -> Phase:
    return Phase(
        name="train", objective_name=options["name"], objective=build_objective(options),
        optimizer=OptimizerConfig(), first_step=0, steps=100,
    )  # fmt: skip


def test_all_zero_advantages_are_said_ever_more_rarely():
    watch = Watch()
    zero, spread = {"advantages/max": 0.0, "advantages/min": 0.0}, {"advantages/max": 1.0, "advantages/min": -1.0}
    said = [number for number in range(1, 18) if watch.update(number, zero if number % 2 else spread)]
    assert said == [1, 3, 7, 15]  # the first, second, fourth and eighth of them
    assert watch.update(18, {}) is None


def test_a_clip_out_of_reach_is_said_once():
    watch, psft = Watch(), phase(name="psft")
    still = {"objective/clip_fraction": 0.0, "objective/ratio_max": 1.01}
    said = [watch.step(psft, still, updates=4) for _ in range(3 * STEPS_WITHOUT_CLIP)]
    (text,) = [one for one in said if one]
    assert said[STEPS_WITHOUT_CLIP - 1] == text
    assert "1.0100" in text
    assert "0.28" in text


def test_a_clip_that_is_reached_now_and_then_is_not_complained_of():
    watch, psft = Watch(), phase(name="psft")
    for number in range(5 * STEPS_WITHOUT_CLIP):
        fraction = 0.01 if number % (STEPS_WITHOUT_CLIP - 1) == 0 else 0.0
        assert watch.step(psft, {"objective/clip_fraction": fraction, "objective/ratio_max": 1.3}, updates=4) is None


def test_nothing_to_say_without_a_clip_or_with_one_update_a_step():
    still = {"objective/clip_fraction": 0.0, "objective/ratio_max": 1.0}
    for objective, updates in ((phase(name="sft"), 4), (phase(name="psft", clip_high=None), 4), (phase(name="psft"), 1)):
        watch = Watch()
        assert not any(watch.step(objective, still, updates) for _ in range(2 * STEPS_WITHOUT_CLIP))
