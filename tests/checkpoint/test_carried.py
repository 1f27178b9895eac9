"""What a model has beside its language model: the same bytes from folder to folder, under the names that it came with.

Not here: a run that trains the language model (tests/e2e/test_vision.py).
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megapsft.checkpoint.convert.hf_to_megatron import hf_to_megatron
from megapsft.checkpoint.convert.megatron_to_hf import megatron_to_hf
from megapsft.checkpoint.convert.verify import verify
from megapsft.checkpoint.convert.workers import Options
from megapsft.checkpoint.hf import save_hf
from megapsft.checkpoint.hf_folder import CARRIED, INDEX, read_config
from megapsft.checkpoint.hf_save import keep_model
from megapsft.checkpoint.weights import rows_of
from megapsft.checkpoint.weights.hf import HFWeights
from megapsft.checkpoint.weights.part import language_model
from megapsft.errors import Refused
from megapsft.models.families import family_of
from tests.checkpoint.folders import change, check
from tests.vision import NESTED, RELEASED, of_vision, qwen2_5_vl, stored

SMALL = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=32, num_attention_heads=2)
QUIET = Options(progress=False, workers=1)
PROCESSOR = "preprocessor_config.json"


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {layout: qwen2_5_vl(root / layout, layout, tied=layout == NESTED, **SMALL) for layout in (NESTED, RELEASED)}
    for folder in made.values():
        (folder / PROCESSOR).write_text('{"patch_size": 4}')
    return made


@pytest.fixture
def model(sources, tmp_path) -> Path:
    return Path(shutil.copytree(sources[RELEASED], tmp_path / "model"))


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(
        tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]) for name, tensor in ours.items()
    )


@pytest.mark.parametrize("layout", [NESTED, RELEASED])
def test_to_megatron_and_back_gives_the_same_tensors_under_the_same_names(layout, sources, tmp_path):
    source, ckpt, back = sources[layout], tmp_path / "ckpt", tmp_path / "back"
    hf_to_megatron(source, ckpt, options=QUIET)
    check(ckpt)
    assert same(load_file(ckpt / CARRIED), of_vision(stored(source)))
    megatron_to_hf(ckpt, back, options=Options(progress=False, read_back=True))
    assert same(stored(back), stored(source))
    assert (back / PROCESSOR).read_text() == (ckpt / PROCESSOR).read_text() == (source / PROCESSOR).read_text()
    assert ("text_config" in json.loads((back / "config.json").read_text())) == (layout == NESTED)
    for one, other in ((source, ckpt), (source, back), (back, ckpt)):
        report = verify(one, other, options=QUIET)
        assert report.problems == report.notes == []
        assert report.equal == report.tensors == len(stored(source))
    manifest = json.loads((back / "conversion.json").read_text())
    assert manifest["source"]["tensors"].keys() == manifest["tensors"].keys()
    assert CARRIED in manifest["source"]["files"]


def test_in_several_files_the_index_has_the_names_of_the_source(sources, tmp_path):
    hf_to_megatron(sources[NESTED], tmp_path / "ckpt", options=QUIET)
    megatron_to_hf(tmp_path / "ckpt", tmp_path / "back", max_shard_bytes=20_000, options=QUIET)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    index = json.loads((tmp_path / "back" / INDEX).read_text())
    assert index["weight_map"].keys() == stored(sources[NESTED]).keys()
    assert same(stored(tmp_path / "back"), stored(sources[NESTED]))
    check(tmp_path / "back")


def test_another_dtype_is_of_the_language_model_alone(model, tmp_path):
    hf_to_megatron(model, tmp_path / "ckpt", dtype="bf16", options=QUIET)
    megatron_to_hf(tmp_path / "ckpt", tmp_path / "back", options=QUIET)
    back = stored(tmp_path / "back")
    assert same(of_vision(back), of_vision(stored(model)))
    assert {tensor.dtype for name, tensor in back.items() if name not in of_vision(back)} == {torch.bfloat16}
    assert read_config(tmp_path / "back").dtype == "bfloat16"


def test_a_model_that_a_run_keeps_has_it_in_either_case(sources, tmp_path):
    hf_to_megatron(sources[NESTED], tmp_path / "ckpt", options=QUIET)
    for source in (sources[NESTED], tmp_path / "ckpt"):
        kept = tmp_path / "kept" / source.name
        kept.mkdir(parents=True)
        keep_model(source, kept / "model")
        assert same(load_file(kept / "model" / CARRIED), of_vision(stored(sources[NESTED])))


@pytest.mark.parametrize("layout", [NESTED, RELEASED])
def test_a_stream_is_written_with_what_its_source_carries(layout, sources, tmp_path):
    source, out = sources[layout], tmp_path / "out"
    hf = read_config(source)
    weights = HFWeights(source, spelling=family_of(hf).spelling)
    names = language_model(weights, family_of(hf)).tensors
    save_hf(((name, rows_of(weights, name)) for name in names), hf, source, out, max_shard_bytes=30_000)
    assert same(stored(out), stored(source))


class TestRefused:
    def test_a_bit_that_flipped(self, model, tmp_path):
        hf_to_megatron(model, tmp_path / "ckpt", options=QUIET)
        content = bytearray((tmp_path / "ckpt" / CARRIED).read_bytes())
        content[-1] ^= 1
        (tmp_path / "ckpt" / CARRIED).write_bytes(content)
        problems = " ".join(verify(model, tmp_path / "ckpt", options=QUIET).problems)
        assert "visual." in problems
        assert "1 tensors changed since conversion.json was written" in problems

    def test_a_file_that_is_gone(self, model, tmp_path):
        hf_to_megatron(model, tmp_path / "ckpt", options=QUIET)
        (tmp_path / "ckpt" / CARRIED).unlink()
        message = "has neither carried.safetensors nor safetensors with what Qwen2_5_VLForConditionalGeneration has beside"
        for attempt in (lambda: check(tmp_path / "ckpt"), lambda: megatron_to_hf(tmp_path / "ckpt", tmp_path / "back")):
            with pytest.raises(Refused, match=message):
                attempt()
        megatron_to_hf(tmp_path / "ckpt", tmp_path / "back", hf_dir=model, options=QUIET)  # the source has it too
        assert same(stored(tmp_path / "back"), stored(model))

    def test_no_vision_tower(self, model, tmp_path):
        change(model, lambda weights: [weights.pop(name) for name in of_vision(weights)])
        for attempt in (lambda: check(model), lambda: hf_to_megatron(model, tmp_path / "ckpt")):
            with pytest.raises(Refused, match=r"has no tensors visual.\*, which Qwen2_5_VLForConditionalGeneration has beside"):
                attempt()

    def test_one_in_fp8(self, model, tmp_path):
        def quantise(weights):
            name = "visual.blocks.0.mlp.up_proj.weight"
            weights[name] = weights[name].to(torch.float8_e4m3fn)
            weights[name + "_scale_inv"] = torch.ones(1, 1)

        change(model, quantise)
        with pytest.raises(Refused, match="1 tensors that are carried along as they are are in FP8: visual.blocks.0.mlp.up_proj"):
            hf_to_megatron(model, tmp_path / "ckpt")

    def test_an_adapter(self, model, tmp_path):
        with pytest.raises(Refused, match="--adapter lora: is not merged into Qwen2_5_VL.*; merge it with PEFT"):
            hf_to_megatron(model, tmp_path / "ckpt", adapter_dir=Path("lora"))

    def test_an_export_in_fp8(self, model, tmp_path):
        hf_to_megatron(model, tmp_path / "ckpt", options=QUIET)
        with pytest.raises(Refused, match="--fp8-blockwise: would say of all of Qwen2_5_VL.* that it is in FP8"):
            megatron_to_hf(tmp_path / "ckpt", tmp_path / "back", fp8_blockwise=True)

    def test_names_of_both_kinds(self, model):
        old, new = "model.norm.weight", "model.language_model.norm.weight"
        change(model, lambda weights: weights.update({new: weights.pop(old)}))
        with pytest.raises(Refused, match="1 tensors are missing that config.json asks for: model.norm.weight"):
            check(model)
