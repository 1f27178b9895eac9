"""What `make test-py312` makes of pytest's reports. Not here: the suite itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import py312

TESTS = """
import pytest

def test_passes(): pass

def test_fails(): assert False

def test_is_skipped(): pytest.skip()

@pytest.fixture
def broken(): raise OSError

def test_has_no_fixture(broken): pass
"""


@pytest.fixture
def result(tmp_path, monkeypatch):
    monkeypatch.setattr(py312, "RESULT", tmp_path / "py312.json")


def test_what_did_not_pass_has_failed(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "test_some.py", "--junitxml=report.xml"]
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    passed, failed = py312.count(tmp_path / "report.xml")
    assert passed == 1
    assert failed == [f"test_some::{name}" for name in ("test_fails", "test_has_no_fixture", "test_is_skipped")]


@pytest.mark.usefixtures("result")
def test_a_record_is_found_again_by_the_environment_that_made_it():
    old, new = {"megatron-core": "0.18.2", "torch": "2"}, {"megatron-core": "0.19.2", "torch": "2"}
    assert py312.recorded(new) == {}
    py312.write(new, "train", {"passed": 1})
    py312.write(old, "data", {"passed": 2})
    py312.write(new, "data", {"passed": 3})
    assert py312.recorded(new) == {"data": {"passed": 3}, "train": {"passed": 1}}
    assert py312.recorded(old) == {"data": {"passed": 2}}
    py312.write(new | {"torch": "3"}, "data", {"passed": 4})
    assert py312.recorded(new) == {}  # another environment with this Megatron-Core took its place
    assert py312.recorded(old) == {"data": {"passed": 2}}


@pytest.mark.usefixtures("result")
def test_without_names_every_part_runs_and_once_more_what_failed_or_was_of_another_source(monkeypatch):
    ran, source, failed = [], ["one"], {"data"}

    def run(part, workers, source):
        ran.append(part)
        return {"source": source, "passed": 1, "failed": ["test_rows"] if part in failed else []}

    monkeypatch.setattr(py312, "run", run)
    monkeypatch.setattr(py312, "digest", lambda: source[0])
    assert py312.main([]) == 1
    assert ran == py312.parts()
    assert {"data", "train", "test_py312.py"} <= set(ran)
    ran.clear()
    assert py312.main([]) == 1
    assert ran == ["data"]
    ran.clear()
    failed.clear()
    assert py312.main(["data", "train"]) == 0
    assert ran == ["data"]
    ran.clear()
    source[0] = "two"
    assert py312.main(["train"]) == 0
    assert ran == ["train"]
    with pytest.raises(SystemExit):
        py312.main(["nothing"])
