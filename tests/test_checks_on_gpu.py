"""What surrounds the checks that need a GPU: what they need is named, what they found is written, what is carried is pinned."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from tests.gpu.__main__ import missing

ROOT = Path(__file__).parents[1]
CHECKS = """
import pytest

def test_measures(record_property):
    record_property("error", {"logprobs": 0.25})

@pytest.mark.parametrize("number", [1, 2])
def test_fails_once(number):
    assert number == 1

@pytest.fixture
def broken():
    raise RuntimeError("no such kernel")

def test_cannot_begin(broken):
    pass
"""


def test_what_is_missing_is_named():
    found = " ".join(missing())
    assert ("torch" in found) == (not torch.cuda.is_available())
    for installed in ("megatron-core", "pydantic", "tyro", "pytest-timeout"):
        assert installed not in found


def test_without_a_gpu_nothing_runs_and_it_says_why():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = ["make", "test-gpu", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "make test-gpu: needs " in done.stderr
    assert "torch" in done.stderr
    assert "make gpu-wheels" in done.stderr


def test_outcomes_and_measured_numbers_are_written(tmp_path):
    (tmp_path / "test_it.py").write_text(CHECKS)
    file = tmp_path / "new" / "test_gpu.json"
    command = [sys.executable, "-m", "pytest", "-p", "tests.gpu.record", "--record", str(file), "-p", "no:cacheprovider"]
    command += ["--rootdir", str(tmp_path), "-c", os.devnull, "test_it.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    found = json.loads(file.read_text())
    assert found["counts"] == {"passed": 2, "failed": 2}
    assert found["machine"]["torch"] == torch.__version__
    tests = {test["name"].split("::")[1]: test for test in found["tests"]}
    assert tests["test_measures"]["measured"] == {"error": {"logprobs": 0.25}}
    passed = {name for name, test in tests.items() if test["outcome"] == "passed"}
    assert passed == {"test_measures", "test_fails_once[1]"}
    assert "no such kernel" in tests["test_cannot_begin"]["error"]
    assert str(tmp_path) not in file.read_text()


def test_what_is_carried_is_pinned_as_here():
    """The versions that CI tests, but for Megatron-Core, whose 0.16 is for an older Python."""
    pins = {name: dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / f"requirements/{name}.txt").read_text(), re.M))
            for name in ("gpu", "laptop")}  # fmt: skip
    assert "megatron-core" in pins["gpu"]
    differing = {name for name, version in pins["gpu"].items() if pins["laptop"].get(name) != version}
    assert differing == {"megatron-core"}


def test_the_script_for_a_machine_without_network_is_sound():
    script = ROOT / "tests/gpu/run.sh"
    assert os.access(script, os.X_OK)
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([str(script)], capture_output=True, text=True)
    assert done.returncode != 0
