"""FP8 beside bfloat16, and the gate before training, as a user asks for them. The same code on a CPU: tests/e2e/test_probe.py."""

from __future__ import annotations

import json

import pytest

from megapsft.checkpoint.random_init import init_model
from tests.command import megapsft
from tests.gpu.measured import succeeded

CONFIG = "configs/psft/tiny-qwen3-gsm8k.yaml"
SMALL = ("model.dtype=bfloat16", "train.batch_size=16", "train.minibatch_size=8", "data.pack_length=512", "train.steps=1",
         "train.sft_warmup_steps=0")  # fmt: skip
SIZES = {"vocab_size": 320, "hidden_size": 128, "head_dim": 32, "intermediate_size": 256}  # multiples of 16, which FP8 asks for


@pytest.fixture(scope="module")
def model(tiny_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("fp8") / "model"
    return init_model(family="qwen3", data_path=tiny_data, out_dir=out, seed=1, **SIZES)


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_fp8_is_measured_and_let_through_by_evidence(recipe, model, tiny_data, tmp_path):
    here = (f"model.path={model}", f"data.path={tiny_data}", f"run.dir={tmp_path / 'run'}", *SMALL)
    eight = ("fp8.format=hybrid", f"fp8.recipe={recipe}")
    done = megapsft("probe", CONFIG, "--out", str(tmp_path / "probe.json"), *here, *eight)
    succeeded(done)
    found = json.loads((tmp_path / "probe.json").read_text())
    assert [one["finer"] for one in found["precisions"]] == ["bfloat16", "float32"]
    assert {one["name"] for one in found["precisions"]} == {f"FP8 (hybrid, {recipe})"}
    assert ("not shared", "fp8.format") in {(row["kind"], row["feature"]) for row in found["rows"]}
    assert found["precisions"][0]["logits_rms"]["mean"] > 2**-9  # coarser than bfloat16
    assert found["max_noise_clipped"] == 0.001

    done = megapsft("train", CONFIG, *here, *eight, "train.max_noise_clipped=1")
    succeeded(done)
    evidence = json.loads((tmp_path / "run/noise.json").read_text())
    assert evidence["accepted"]
    assert (evidence["unit"], evidence["count"]) == ("tokens", found["count"])
