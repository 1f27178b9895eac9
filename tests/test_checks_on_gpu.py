"""What surrounds the checks that need a GPU: what they need is named, what they found is written, what is carried is pinned."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megapsft.checkpoint.random_init import init_model
from megapsft.config import load_config
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


def test_what_is_found_is_written_after_each_check_beside_what_earlier_commands_of_the_day_found(tmp_path):
    file = tmp_path / "test_gpu.json"
    (tmp_path / "test_first.py").write_text("def test_of_before(): pass\n")
    (tmp_path / "test_second.py").write_text(
        f"import json\n\ndef written(): return {{test['name'] for test in json.load(open({str(file)!r}))['tests']}}\n\n"
        "def test_a(): assert written() == {'test_first.py::test_of_before'}\n"
        "def test_b(): assert written() == {'test_first.py::test_of_before', 'test_second.py::test_a'}\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "tests.gpu.record", "--record", str(file), "-p", "no:cacheprovider"]
    command += ["--rootdir", str(tmp_path), "-c", os.devnull]
    for name in ("test_first.py", "test_second.py"):
        done = subprocess.run(
            [*command, name], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout
    assert json.loads(file.read_text())["counts"] == {"passed": 3}
    of_yesterday = json.loads(file.read_text()) | {"date": "2026-01-01"}
    file.write_text(json.dumps(of_yesterday))
    subprocess.run(
        [*command, "test_first.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=True
    )
    assert json.loads(file.read_text())["counts"] == {"passed": 1}


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_the_check_of_noise_asks_for_what_a_hopper_can_do(recipe, tiny_data, tmp_path, monkeypatch):
    from megapsft.train import plan
    from tests.gpu import scenarios, test_noise

    monkeypatch.setattr(plan, "this_machine", lambda: scenarios.HOPPER)
    model = init_model(family="qwen3", data_path=tiny_data, out_dir=tmp_path / "model", seed=1, **test_noise.SIZES)
    here = (f"model.path={model}", f"data.path={tiny_data}", f"run.dir={tmp_path / 'run'}", *test_noise.SMALL)
    config = load_config(ROOT / test_noise.CONFIG, [*here, "fp8.format=hybrid", f"fp8.recipe={recipe}"])
    assert plan.plan_run(config, 1).config.fp8.recipe == recipe


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


def test_the_script_leaves_results_as_they_grow_and_ends_as_the_checks_do(tmp_path):
    """With an interpreter that only says what it was asked for."""
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(
        '#!/bin/bash\n[ "$2" != pip ] || exit 0\necho "$@"\necho "$PYTHONPATH" >&2\ntouch "$5/test_gpu.json"\nexit 3\n'
    )
    python.chmod(0o755)
    command = [str(ROOT / "tests/gpu/run.sh"), "test", "out", "tests/gpu/test_head.py", "-x"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHON": str(python)}, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    log = (out / "test.log").read_text()
    assert log == done.stdout
    assert log.splitlines()[0] == f"-m tests.gpu test --results {out} tests/gpu/test_head.py -x"
    assert log.splitlines()[1].startswith(f"{ROOT}:")
    assert (out / "test_gpu.json").is_file()
