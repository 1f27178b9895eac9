"""Clipped words, from counts that are made up."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megapsft.report.clipped import Clipped, by_epoch, cloud, rates, read_counts
from megapsft.report.probabilities import first_and_last, probability_histogram
from megapsft.report.words import spelt

LINES = [  # wait is rare and clipped often; the is frequent and clipped more times
    {"epoch": 1, "update": 2, "ids": [5, 7], "tokens": [" the", "wait"], "trained": [100, 4], "clipped": [3, 0]},
    {"epoch": 1, "update": 4, "ids": [5, 7, 9], "tokens": [" the", "wait", "\n"], "trained": [100, 6], "clipped": [2, 4]},
    {"epoch": 3, "update": 6, "ids": [7, 5, 9], "tokens": ["wait", " the", "\n"], "trained": [10, 100, 2], "clipped": [1, 0, 2]},
]
LINES[1]["trained"].append(1)
LINES[1]["clipped"].append(0)


def test_lines_of_an_epoch_are_one():
    assert by_epoch(LINES) == {
        1: [Clipped(" the", 200, 5), Clipped("wait", 10, 4), Clipped("\n", 1, 0)],
        3: [Clipped("\n", 2, 2), Clipped("wait", 10, 1), Clipped(" the", 100, 0)],
    }
    assert by_epoch([]) == {}


def test_the_cloud_is_of_the_words_that_were_clipped_most():
    shown = cloud("psft", 1, by_epoch(LINES)[1], "cloud-1")
    assert [(token.text, token.value) for token in shown.tokens] == [("␣the", 5.0), ("wait", 4.0)]
    assert shown.tokens[1].hover == "of the 10 times that it was trained: 40.0%"
    assert shown.note == "9 of 211 tokens were clipped in this epoch, 4.27%."
    assert shown.words == "times clipped: '␣the' 5, 'wait' 4"


def test_the_table_is_normalised_by_frequency():
    shown = rates("psft", by_epoch(LINES), "rates")
    assert list(shown.heading) == ["token", "trained in epoch 3", "clipped", "rate in epoch 1", "rate in epoch 3"]
    assert shown.rows == [["wait", "10", "1", "40.0%", "10.0%"], ["␣the", "100", "0", "2.5%", "0.0%"]]  # the line break: too few
    (later,) = rates("psft", {1: [Clipped("a", 5, 5)], 2: [Clipped("b", 5, 1)]}, "rates").rows
    assert later == ["b", "5", "1", "–", "20.0%"]


def test_counts_of_a_run(tmp_path):
    assert list(read_counts(tmp_path)) == []
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens/counts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    assert read_counts(tmp_path) == LINES


def test_probabilities():
    """Of ten tokens nine are sure and one is impossible; with a probability of 0.5 one is in the upper of two bins that meet."""
    sure = [0.0] * 9 + [None]
    shown = probability_histogram({"tuned": sure, "base": [np.log(0.5)] * 4}, "probabilities", "Probabilities")
    tuned, base = (series.values for series in shown.series)
    assert (tuned[0], tuned[-1], sum(tuned)) == (pytest.approx(10), pytest.approx(90), pytest.approx(100))
    assert base[10] == pytest.approx(100)
    assert shown.log_y
    assert shown.edges[:2] == pytest.approx([0, 0.05])


def test_the_first_and_the_last_step_that_were_recorded(tmp_path):
    assert first_and_last(tmp_path) == {}
    (tmp_path / "tokens").mkdir()
    for step, update, logprobs in ((2, 3, [-1.0, None]), (2, 4, [-2.0]), (4, 7, [-3.0]), (10, 19, [-0.5, -0.25])):
        file = tmp_path / f"tokens/step-{step:06d}-update-{update:06d}.jsonl"
        file.write_text(json.dumps({"logprobs": logprobs}) + "\n")
    assert first_and_last(tmp_path) == {"step 2": [-1.0, None, -2.0], "step 10": [-0.5, -0.25]}


def test_white_space_is_seen():
    assert [spelt(text) for text in (" the", "the", "\n\n", "\t", "")] == ["␣the", "the", "⏎⏎", "⇥", "∅"]
