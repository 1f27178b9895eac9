"""Which interpreter has a program of an environment of its own."""

import sys

import pytest

from megapsft.cluster.slurm.nemo import NEMO_RUN
from megapsft.errors import Refused
from megapsft.platform import interpreter
from megapsft.platform.interpreter import Elsewhere
from megapsft.rollout.sglang.server import SGLANG


@pytest.mark.parametrize("program", [SGLANG, NEMO_RUN], ids=lambda program: program.target)
def test_where_it_is_looked_for(program, tmp_path, monkeypatch):
    monkeypatch.delenv(program.variable, raising=False)
    monkeypatch.chdir(tmp_path)
    found = tmp_path / f".venv-{program.target}" / "bin" / "python"
    found.parent.mkdir(parents=True)
    found.symlink_to(sys.executable)
    assert program.find_python() == found
    monkeypatch.setenv(program.variable, sys.executable)
    assert str(program.find_python()) == sys.executable
    monkeypatch.setenv(program.variable, str(tmp_path / "none"))
    with pytest.raises(Refused, match=f"{program.variable}=.*none: is not an interpreter; .* has {program.target}$"):
        program.find_python()


def test_the_config_goes_before_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv(SGLANG.variable, str(tmp_path / "none"))
    assert str(SGLANG.find_python(sys.executable)) == sys.executable
    with pytest.raises(Refused, match=r"rollout.python=.*is not an interpreter"):
        SGLANG.find_python(str(tmp_path / "none"))


def test_this_one_where_it_has_it_and_else_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(interpreter, "HOME", tmp_path)
    here = dict(name="Numbers", target="numbers", variable="NUMBERS_PYTHON", wanted="--numbers")
    assert str(Elsewhere(module="numpy", **here).find_python()) == sys.executable
    with pytest.raises(Refused, match="^--numbers: Numbers is not installed; run `make numbers`, .*: NUMBERS_PYTHON=...$"):
        Elsewhere(module="no_such_module", **here).find_python()
