"""What `verify` finds: every way in which an export can be wrong though it loads. Not here: reading and writing themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megapsft.checkpoint.convert.hf_to_megatron import hf_to_megatron
from megapsft.checkpoint.convert.megatron_to_hf import megatron_to_hf
from megapsft.checkpoint.convert.verify import verify
from megapsft.checkpoint.files.safetensors import read_header
from megapsft.checkpoint.hf_folder import SINGLE, read_config
from megapsft.checkpoint.hf_save import MANIFEST
from megapsft.checkpoint.weights.torch_dist import DistWeights
from megapsft.cli import main
from megapsft.errors import Refused
from tests.command import megapsft

EXPERT = "model.layers.2.mlp.experts.{}.{}_proj.weight"


@pytest.fixture
def source(tiny_models, tmp_path) -> Path:
    """A folder that may be changed."""
    return shutil.copytree(tiny_models("qwen3_moe"), tmp_path / "source")


@pytest.fixture
def converted(source, tmp_path) -> Path:
    hf_to_megatron(source, tmp_path / "converted")
    return tmp_path / "converted"


@pytest.fixture
def exported(converted, tmp_path) -> Path:
    megatron_to_hf(converted, tmp_path / "exported")
    return tmp_path / "exported"


def rewrite(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / SINGLE)
    edit(weights)
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})


def flip(path: Path, offset: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def problem(report) -> str:
    """The only one."""
    (found,) = report.problems
    return found


def test_a_round_trip_is_equal_on_both_sides(source, converted, exported):
    for other in (source, converted, converted / "release"):
        report = verify(exported, other)
        assert (report.problems, report.notes, report.rounded) == ([], [], 0)
        assert report.equal == report.tensors == len(load_file(source / SINGLE))


@pytest.mark.parametrize("bit", [0, 7])
def test_one_flipped_bit_in_an_export_is_found_twice(bit, source, converted, exported):
    """By comparing, and by the manifest alone: against the source, and against itself."""
    name = EXPERT.format(3, "up")
    flip(exported / SINGLE, read_header(exported / SINGLE)[name].offset + 40, bit)
    for other in (source, converted):
        values, manifest = verify(exported, other).problems
        assert values.startswith(f"{name}: 1 of 4096 elements differ, first [0, 10], by ")
        assert manifest == f"{exported}: 1 tensors changed since {MANIFEST} was written: {name}"
    alone = verify(exported, exported).problems
    assert alone == [f"{exported}: 1 tensors changed since {MANIFEST} was written: {name}"] * 2


def test_one_flipped_bit_in_an_import_is_found(source, converted):
    path, start, nbytes = list(DistWeights(converted / "release", read_config(converted)).places())[40]
    flip(path, start + nbytes // 2)
    values, manifest = verify(source, converted).problems
    assert "1 of " in values
    assert manifest.startswith(f"{converted / 'release'}: 1 tensors changed since {MANIFEST} was written: ")


def test_one_flipped_bit_anywhere_else_is_found_by_the_manifest(exported, converted):
    for number, path in enumerate([*exported.iterdir(), *(converted / "release").iterdir()]):
        if path.name in (MANIFEST, ".metadata", "config.json", "metadata.json"):  # these cannot even be read, or are compared
            continue
        at = 300 if path.suffix == ".distcp" else 8 + number  # in a header, the names of tensors or zip entries
        before = path.read_bytes()
        flip(path, min(at, len(before) - 1), 5)
        try:
            problems = verify(exported, converted).problems
        except Refused:
            problems = [path.name]
        assert any(path.name in text for text in problems), path
        path.write_bytes(before)
    assert verify(exported, converted).problems == []


def test_a_swapped_pair_of_experts_is_named(source, converted):
    def swap(weights):
        for part in ("gate", "up", "down"):
            a, b = EXPERT.format(1, part), EXPERT.format(6, part)
            weights[a], weights[b] = weights[b], weights[a]

    rewrite(source, swap)
    problems = verify(source, converted).problems
    assert len(problems) == 6
    first = EXPERT.format(1, "gate")
    (found,) = [text for text in problems if text.startswith(first)]
    assert found.endswith(f"it is what the other has as {EXPERT.format(6, 'gate')}")


def test_a_file_of_an_older_export_is_found(source, exported):
    shutil.copyfile(exported / SINGLE, exported / "model-00002-of-00002.safetensors")
    found = problem(verify(exported, source))
    assert "model-00002-of-00002.safetensors does not belong to the model: a file of another export?" in found


def test_a_stale_index_is_found(source, exported):
    (exported / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    assert "model.safetensors.index.json does not belong to the model" in problem(verify(exported, source))


def test_equal_weights_of_two_steps_are_a_failure_of_training_or_of_the_export(exported, tmp_path):
    later = shutil.copytree(exported, tmp_path / "later")
    for folder, step in ((exported, 50), (later, 100)):
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(manifest | {"step": step}))
    found = problem(verify(later, exported))
    assert found.startswith(f"step 100 ({later}) and step 50 ({exported}) have the same weights, although training moved")


def test_an_export_of_another_step_differs_from_the_checkpoint_it_should_be_of(source, converted, exported):
    rewrite(source, lambda weights: [tensor.add_(0.01) for tensor in weights.values()])
    report = verify(source, exported)
    assert report.equal == 0
    assert len(report.problems) == 21  # twenty in words, the others counted
    assert report.problems[-1] == f"and {report.tensors - 20} more tensors differ"


def test_a_tensor_too_many_on_either_side(source, exported):
    rewrite(source, lambda weights: weights.update(more=torch.zeros(3)))
    assert problem(verify(source, exported)) == f"{source} has 1 tensors that {exported} has not: more"
    assert problem(verify(exported, source)) == f"{source} has 1 tensors that {exported} has not: more"


def test_buffers_that_old_versions_saved_are_no_difference(source, exported):
    rewrite(source, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert verify(source, exported).problems == []


def test_another_config(source, exported):
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    values, manifest = verify(exported, source).problems
    assert values == "config.json: rms_norm_eps is 1e-05, and 1e-06 in the other"
    assert manifest == f"{exported}: 1 files changed or are gone since {MANIFEST} was written: config.json"


def test_rounded_weights_are_equal_once_rounded(source, converted, tmp_path):
    megatron_to_hf(converted, tmp_path / "half", dtype="bf16")
    report = verify(tmp_path / "half", source)
    assert (report.problems, report.equal, report.rounded) == ([], 0, report.tensors)
    assert "are stored as BF16 and F32, and are equal once rounded" in report.notes[0]
    rewrite(source, lambda weights: weights[EXPERT.format(0, "up")][3].mul_(1.02))
    assert problem(verify(tmp_path / "half", source)).startswith(f"{EXPERT.format(0, 'up')}: 64 of 4096 elements differ")


def test_fp8_is_compared_bit_by_bit_with_what_the_other_would_be(source, converted, tmp_path):
    megatron_to_hf(converted, tmp_path / "fp8", dtype="bf16", fp8_blockwise=True)
    assert verify(tmp_path / "fp8", converted).problems == []
    assert verify(source, tmp_path / "fp8").problems == []
    place = read_header(tmp_path / "fp8" / SINGLE)[EXPERT.format(5, "down") + "_scale_inv"]
    flip(tmp_path / "fp8" / SINGLE, place.offset)
    assert [EXPERT.format(5, "down") + "_scale_inv" in text for text in verify(tmp_path / "fp8", converted).problems] == [
        True,
        True,
    ]


def test_the_command_says_so_by_its_exit_code(source, converted, exported, capsys):
    same = ["convert", "verify", "--hf", str(exported), "--against"]
    assert main([*same, str(converted)]) == 0
    assert "135 of 135 tensors are equal bit by bit" in capsys.readouterr().out
    flip(exported / SINGLE, (exported / SINGLE).stat().st_size - 3)
    assert main([*same, str(source)]) == 1
    assert "DIFFERENT: " in capsys.readouterr().out
    assert main([*same, str(source / "nowhere")]) == 2


@pytest.mark.parametrize("changed", [False, True])
def test_logits_of_the_folder_and_of_our_model(changed, source, converted):
    if changed:  # not seen by a comparison of weights: another theta
        config = json.loads((source / "config.json").read_text())
        config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 500.0
        (source / "config.json").write_text(json.dumps(config))
    # in a process of its own: threads of torch.distributed would not survive the forks of later tests
    done = megapsft("convert", "verify", "--hf", str(source), "--against", str(converted), "--logits")
    assert done.returncode == int(changed), done.stderr
    assert ("DIFFERENT: logits on 128 random tokens differ by" if changed else "note: logits on 128 random tokens") in done.stdout
    assert ("DIFFERENT: config.json: rope is" in done.stdout) == changed
