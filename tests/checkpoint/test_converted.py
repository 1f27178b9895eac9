"""A run on a converted folder begins as one on the Hugging Face folder does, under any split; and its export needs neither.

Not here: the conversion itself (tests/checkpoint/convert).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megapsft.checkpoint.convert.hf_to_megatron import hf_to_megatron
from megapsft.checkpoint.convert.megatron_to_hf import megatron_to_hf
from megapsft.checkpoint.convert.verify import verify
from megapsft.checkpoint.hf_folder import SINGLE
from megapsft.cli import main
from tests.checkpoint.test_dist import train_to_end
from tests.invariants.splits import Split, split

SPLITS = {
    "qwen3": [split("1 rank"), split("tp2", 2, tp=2), split("pp2", 2, pp=2)],
    "qwen3_moe": [split("1 rank"), split("tp2+sp", 2, tp=2, sp=True), split("pp2", 2, pp=2), split("ep2", 2, ep=2)],
}


@pytest.mark.parametrize("family", SPLITS)
def test_psft_starts_from_a_converted_folder_with_the_same_loss(family, tiny_models, tiny_data, tmp_path):
    hf_to_megatron(tiny_models(family), tmp_path / "converted")
    expected = first_update(tiny_models(family), tiny_data, tmp_path / "hf", SPLITS[family][0])
    assert expected["train/loss"] == pytest.approx(-1)  # PSFT's, at its old policy
    assert 3 < expected["objective/nll"] < 10
    for number, on in enumerate(SPLITS[family]):
        found = first_update(tmp_path / "converted", tiny_data, tmp_path / str(number), on)
        for key in ("train/loss", "objective/nll", "train/grad_norm"):
            assert found[key] == (expected[key] if number == 0 else pytest.approx(expected[key], rel=1e-5)), (on.name, key)


def test_a_run_exports_without_the_folder_it_started_from(tiny_models, tiny_data, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_models("qwen3_moe"), model)
    first_update(model, tiny_data, tmp_path / "run", split("tp2+ep2+etp1+zero1", 2, tp=2, ep=2, etp=1, zero1=True))
    before = load_file(model / SINGLE)
    shutil.rmtree(model)
    megatron_to_hf(tmp_path / "run", tmp_path / "out")
    after = load_file(tmp_path / "out" / SINGLE)
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(before)  # all were trained
    assert verify(tmp_path / "out", tmp_path / "run").problems == []
    assert (tmp_path / "out/tokenizer.json").is_file()


def first_update(model: Path, data: Path, run: Path, on: Split) -> dict[str, float]:
    """Metrics of the one update of a run with PSFT."""
    (record,) = train_to_end(model, data, run, on, ("train.sft_warmup_steps=0", "train.steps=1", "train.minibatch_size=8"))
    return record


def test_a_dry_run_checks_everything_and_writes_nothing(tiny_models, tmp_path, capsys):
    command = ["convert", "hf-to-megatron", "--hf", str(tiny_models("qwen3")), "--out", str(tmp_path / "a/out")]
    assert main([*command, "--dry-run"]) == 0
    assert f"would write {tmp_path / 'a/out'}: 47 tensors, 1.1 MB" in capsys.readouterr().out
    assert main([*command, "--dry-run", "--max-memory", "10MiB"]) == 2
    assert "is not enough" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main(command) == 0
    back = ["convert", "megatron-to-hf", "--megatron", str(tmp_path / "a/out"), "--out", str(tmp_path / "hf"), "--dry-run"]
    assert main(back) == 0
    assert not (tmp_path / "hf").exists()
    assert main([*back[:5], str(tmp_path / "a/out"), *back[6:]]) == 2  # where something is already
    assert "exists and is not an empty folder" in capsys.readouterr().err
