"""From updates to their step. Not here: what a run adds of its own (tests/test_cli.py reads whole records)."""

from __future__ import annotations

import pytest

from megapsft.train.step_record import of_step, speed

FIRST = {"data/trained_tokens": 10, "perf/seconds": 1.0, "train/loss": 1.0, "objective/ratio_max": 2.0, "reward/min": -1.0,
         "train/grad_norm": 1.0, "train/lr": 0.1}  # fmt: skip
SECOND = {"data/trained_tokens": 30, "perf/seconds": 3.0, "train/loss": 2.0, "objective/ratio_max": 1.5, "reward/min": -3.0,
          "train/grad_norm": 2.0, "train/lr": 0.05}  # fmt: skip


def test_means_are_over_tokens_and_the_rest_as_it_is_named():
    assert of_step([FIRST, SECOND]) == {
        "data/trained_tokens": 40, "perf/seconds": 4.0, "train/loss": 1.75, "objective/ratio_max": 2.0, "reward/min": -3.0,
        "train/grad_norm": 1.5, "train/lr": 0.05,
    }  # fmt: skip


def test_updates_without_tokens_have_a_mean_of_zero():
    assert of_step([FIRST | {"data/trained_tokens": 0}])["train/loss"] == 0.0


def test_speed_is_of_the_world_and_of_a_device():
    metrics = {"perf/seconds": 2.0, "data/real_tokens": 100, "perf/model_flops": 8e12}
    assert speed(metrics, 4, None) == {"perf/tokens_per_second": 50.0, "perf/tflops_per_device": 1.0}
    assert speed(metrics, 4, 2e12)["perf/mfu"] == pytest.approx(0.5)
