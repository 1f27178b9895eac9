"""Whose layers a machine can have, and which apex Megatron is shown. Not here: a machine with a GPU (tests/gpu)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megapsft.config import ModelConfig
from megapsft.errors import Refused
from megapsft.platform.apex import note_on_apex
from megapsft.platform.machine import Machine, layers_of, note_on_layers, this_machine, version_of

HOPPER = Machine(capability=(9, 0), cuda=(13, 0), transformer_engine=(2, 19))
WITHOUT = Machine(capability=(9, 0), cuda=(13, 0))
ROOT = Path(__file__).parents[2]


def test_this_machine_has_no_gpu():
    assert this_machine() == Machine()


@pytest.mark.parametrize(("text", "version"), [("2.19.0", (2, 19)), ("2.3.0.dev0+5fdd7bb", (2, 3)), ("13", (13, 0))])
def test_versions(text, version):
    assert version_of(text) == version


@pytest.mark.parametrize(
    ("asked", "dtype", "machine", "layers"),
    [
        ("auto", "bfloat16", HOPPER, "transformer_engine"),
        ("auto", "float32", HOPPER, "local"),
        ("auto", "bfloat16", WITHOUT, "local"),
        ("auto", "bfloat16", Machine(), "local"),
        ("local", "bfloat16", HOPPER, "local"),
        ("transformer_engine", "bfloat16", HOPPER, "transformer_engine"),
    ],
)
def test_layers(asked, dtype, machine, layers):
    assert layers_of(ModelConfig(transformer_impl=asked, dtype=dtype), machine) == layers


@pytest.mark.parametrize(
    ("dtype", "machine", "rule", "remedy"),
    [
        ("bfloat16", Machine(), "needs a CUDA GPU, and torch sees none", "transformer_impl=auto"),
        ("bfloat16", WITHOUT, "is not installed", "docs/gpu.md"),
        ("bfloat16", Machine(capability=(9, 0), transformer_engine=(1, 13)), "is 1.13, and 2.3 or newer is needed", "install"),
        ("bfloat16", Machine(capability=(9, 0), problem="OSError: libcublas"), "cannot be imported: OSError: libcublas", "auto"),
        ("float32", HOPPER, "has no attention to packed rows in float32", "model.dtype=bfloat16"),
    ],
)
def test_layers_that_cannot_be_are_refused_where_they_are_asked_for(dtype, machine, rule, remedy):
    with pytest.raises(Refused) as caught:
        layers_of(ModelConfig(transformer_impl="transformer_engine", dtype=dtype), machine)
    assert caught.value.value == "model.transformer_impl=transformer_engine"
    assert rule in caught.value.rule
    assert remedy in caught.value.remedy


def test_a_gpu_without_transformer_engine_is_news_and_a_cpu_is_not():
    assert "Transformer Engine is not installed" in note_on_layers(ModelConfig(), WITHOUT)
    for model, machine in ((ModelConfig(), Machine()), (ModelConfig(), HOPPER), (ModelConfig(transformer_impl="local"), WITHOUT)):
        assert note_on_layers(model, machine) is None


BY = "import megapsft; from megapsft.platform.apex import other_apex; print(other_apex()); import apex"


@pytest.mark.parametrize("kind", ["another program", "without kernels", "with kernels", "none"])
def test_an_apex_that_is_not_nvidias_is_not_shown_to_megatron(kind, tmp_path):
    if kind != "none":
        (tmp_path / "apex").mkdir()
        (tmp_path / "apex" / "__init__.py").write_text("1 / 0" if kind == "another program" else "")
    if kind in ("without kernels", "with kernels"):
        (tmp_path / "apex" / "multi_tensor_apply").mkdir()
    if kind == "with kernels":
        (tmp_path / "amp_C.py").write_text("")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", BY], env=environment, capture_output=True, text=True, timeout=120)
    hidden = kind in ("another program", "without kernels")
    assert done.stdout.strip() == (str(tmp_path / "apex") if hidden else "None")
    assert (done.returncode == 0) == (kind == "with kernels")
    assert ("ModuleNotFoundError" in done.stderr) == (kind != "with kernels")


def test_the_user_is_told_of_such_an_apex(tmp_path, monkeypatch):
    assert note_on_apex() is None
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert f"{tmp_path / 'apex'} is not NVIDIA's" in note_on_apex()
