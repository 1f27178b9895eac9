"""All sinks together. What each tracker makes of it: test_tensorboard.py, test_weights_and_biases.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megapsft.metrics.records import read_records
from megapsft.metrics.sinks import Sinks
from megapsft.metrics.tensorboard import TensorBoard
from tests.metrics.pages import events

UPDATE = {"update": 8, "step": 1, "phase": "train", "objective": "psft", "train/loss": -1.0, "objective/nll": 0.5}
STEP = UPDATE | {"train/loss": -1.1}


def read_tensorboard(directory):
    """{tag: [(x, value), ...]}"""
    found = events(directory)
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_the_same_keys_everywhere(tmp_path):
    sinks = Sinks(tmp_path, [TensorBoard(tmp_path / "tensorboard")])
    sinks.write_update(UPDATE)
    sinks.write_step(STEP)
    sinks.close()
    assert read_records(tmp_path / "metrics.jsonl") == [UPDATE]
    assert read_records(tmp_path / "steps.jsonl") == [STEP]
    assert read_tensorboard(tmp_path / "tensorboard") == {
        "train/loss": [(8, -1.0)],
        "objective/nll": [(8, 0.5)],
        "step/train/loss": [(8, pytest.approx(-1.1))],
        "step/objective/nll": [(8, 0.5)],
    }


def test_resuming_forgets_what_will_come_again(tmp_path):
    sinks = Sinks(tmp_path, [TensorBoard(tmp_path / "tensorboard")])
    for update in (1, 2, 3):
        sinks.write_update({"update": update, "train/loss": 1.0})
        sinks.write_step({"update": update, "train/loss": 1.0})
    sinks.close()

    sinks = Sinks(tmp_path, [TensorBoard(tmp_path / "tensorboard", resumed_at=1)])
    sinks.resume(1)
    sinks.write_update({"update": 2, "train/loss": 2.0})
    sinks.close()
    assert [record["update"] for record in read_records(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [record["update"] for record in read_records(tmp_path / "steps.jsonl")] == [1]
    assert read_tensorboard(tmp_path / "tensorboard") == {"train/loss": [(1, 1.0), (2, 2.0)], "step/train/loss": [(1, 1.0)]}


def test_benchmarks_that_were_answered_are_known_when_a_run_goes_on(tmp_path):
    sinks = Sinks(tmp_path)
    assert not sinks.evaluated(0)
    for step in (0, 2, 4):
        sinks.write_evaluation({"update": 2 * step, "step": step, "evaluate/sums/avg": 0.5})
    sinks.close()

    sinks = Sinks(tmp_path)
    assert sinks.evaluated(4)
    sinks.resume(6)  # from a checkpoint after step 3
    assert not sinks.evaluated(4)
    assert not sinks.evaluated(3)
    assert sinks.evaluated(2)
    sinks.close()


@pytest.mark.parametrize(
    ("package", "make", "said"),
    [
        ("wandb", "weights_and_biases import WandB; WandB('.', project='p', mode='offline')", "log.wandb=disabled"),
        ("tensorboard", "tensorboard import TensorBoard; TensorBoard('.')", "log.tensorboard=false"),
    ],
)
def test_a_missing_package_is_refused_with_the_remedy(tmp_path, package, make, said):
    (tmp_path / f"{package}.py").write_text("raise ModuleNotFoundError('not installed')")  # found first, as if it were missing
    code = f"from megapsft.errors import *\ntry:\n    from megapsft.metrics.{make}\nexcept Refused as error:\n    print(error)"
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert "megapsft[track]" in run.stdout, run.stderr
    assert said in run.stdout
