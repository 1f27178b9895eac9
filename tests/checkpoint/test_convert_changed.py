"""Conversions that change numbers on their way: FP8 in and out, another dtype, LoRA merged or kept.

Not here: those that change nothing (tests/checkpoint/convert).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megapsft.checkpoint.convert.hf_to_megatron import hf_to_megatron
from megapsft.checkpoint.convert.megatron_to_hf import megatron_to_hf
from megapsft.checkpoint.convert.verify import verify
from megapsft.checkpoint.files.torch_dist import read_index
from megapsft.checkpoint.hf_folder import SINGLE, check_checkpoint, read_config
from megapsft.checkpoint.hf_save import MANIFEST
from megapsft.errors import Refused
from megapsft.models.families import family_of

PREFIX = "base_model.model."
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def quantised(model: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The model in FP8 as its makers would store it; gives what it stands for, in fp32."""
    shutil.copytree(model, folder)
    stored, exact = {}, {}
    for name, tensor in load_file(model / SINGLE).items():
        exact[name] = stored[name] = tensor.to(torch.bfloat16)
        if name.endswith("_proj.weight"):
            scale = tensor.abs().amax() / 448
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[name + "_scale_inv"] = scale.reshape(1, 1)
            exact[name] = stored[name].float() * scale
    save_file(stored, folder / SINGLE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": FP8}))
    return exact


def adapter(model: Path, folder: Path, rank: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """LoRA of every linear layer of the model, experts included; gives what it adds to each."""
    generator, content, added = torch.Generator().manual_seed(seed), {}, {}
    for name, weight in load_file(model / SINGLE).items():
        if name.endswith("_proj.weight"):
            at = PREFIX + name.removesuffix(".weight")
            a = content[f"{at}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator)
            b = content[f"{at}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=generator) / 100
            added[name] = 2 * (b.double() @ a.double())
    folder.mkdir()
    save_file(content, folder / "adapter_model.safetensors")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return added


class TestFP8:
    @pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
    def test_scales_are_applied_in_fp32_and_the_config_says_so(self, family, tiny_models, tmp_path):
        exact = quantised(tiny_models(family), tmp_path / "fp8")
        hf_to_megatron(tmp_path / "fp8", tmp_path / "converted")
        megatron_to_hf(tmp_path / "converted", tmp_path / "out")
        found = load_file(tmp_path / "out" / SINGLE)
        assert found.keys() == exact.keys()
        assert all(torch.equal(found[name], tensor.to(torch.bfloat16)) for name, tensor in exact.items())
        config = json.loads((tmp_path / "out/config.json").read_text())
        assert (config["dtype"], config.get("quantization_config")) == ("bfloat16", None)
        source = json.loads((tmp_path / "converted" / MANIFEST).read_text())["source"]["tensors"]
        assert source["model.layers.0.self_attn.q_proj.weight"]["dtype"] == "F8_E4M3"
        assert source["model.layers.0.self_attn.q_proj.weight_scale_inv"]["dtype"] == "F32"

    def test_a_dtype_is_rounded_to_once(self, tiny_models, tmp_path):
        exact = quantised(tiny_models("qwen3"), tmp_path / "fp8")
        hf_to_megatron(tmp_path / "fp8", tmp_path / "converted", dtype="fp32")
        megatron_to_hf(tmp_path / "converted", tmp_path / "out")
        found = load_file(tmp_path / "out" / SINGLE)
        assert all(torch.equal(found[name], tensor.float()) for name, tensor in exact.items())

    def test_a_run_can_start_from_the_folder_itself(self, tiny_models, tmp_path):
        exact = quantised(tiny_models("qwen3"), tmp_path / "fp8")
        hf = read_config(tmp_path / "fp8")
        weights = check_checkpoint(tmp_path / "fp8", family_of(hf), hf)
        assert all(torch.equal(weights.read(name, slice(None)), exact[name].to(torch.bfloat16)) for name in exact)

    def test_an_export_can_be_imported_again(self, tiny_models, tmp_path):
        hf_to_megatron(tiny_models("qwen3_moe"), tmp_path / "first")
        megatron_to_hf(tmp_path / "first", tmp_path / "fp8", dtype="bf16", fp8_blockwise=True)
        hf_to_megatron(tmp_path / "fp8", tmp_path / "second")
        megatron_to_hf(tmp_path / "second", tmp_path / "again", fp8_blockwise=True)
        assert verify(tmp_path / "fp8", tmp_path / "second").problems == []
        first, again = load_file(tmp_path / "fp8" / SINGLE), load_file(tmp_path / "again" / SINGLE)
        assert first.keys() == again.keys()
        values = [name for name, tensor in first.items() if tensor.dtype == torch.float8_e4m3fn]
        assert len(values) == 4 * (4 + 3 * 8)
        assert all(torch.equal(first[name].view(torch.uint8), again[name].view(torch.uint8)) for name in values)
        config = json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]
        assert FP8.items() <= config.items()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_import_rounds_to_the_dtype_that_is_asked_for(dtype, tiny_models, tmp_path):
    hf_to_megatron(tiny_models("qwen2"), tmp_path / "converted", dtype={torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype])
    megatron_to_hf(tmp_path / "converted", tmp_path / "out", dtype="fp32")
    for name, tensor in load_file(tiny_models("qwen2") / SINGLE).items():
        assert torch.equal(load_file(tmp_path / "out" / SINGLE)[name], tensor.to(dtype).float()), name


class TestAdapter:
    @pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
    def test_it_is_merged(self, family, tiny_models, tmp_path):
        added = adapter(tiny_models(family), tmp_path / "lora")
        hf_to_megatron(tiny_models(family), tmp_path / "converted", adapter_dir=tmp_path / "lora")
        megatron_to_hf(tmp_path / "converted", tmp_path / "out")
        found = load_file(tmp_path / "out" / SINGLE)
        for name, tensor in load_file(tiny_models(family) / SINGLE).items():
            if name in added:
                assert not torch.equal(found[name], tensor)
                torch.testing.assert_close(found[name].double(), tensor.double() + added[name], rtol=1e-6, atol=1e-7)
            else:
                assert torch.equal(found[name], tensor), name
        assert not (tmp_path / "out/adapter").exists()

    @pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
    def test_it_is_kept_beside_the_base_and_comes_back_bit_by_bit(self, family, tiny_models, tmp_path):
        adapter(tiny_models(family), tmp_path / "lora")
        hf_to_megatron(tiny_models(family), tmp_path / "converted", adapter_dir=tmp_path / "lora", keep_adapter=True)
        megatron_to_hf(tmp_path / "converted", tmp_path / "out", max_shard_bytes=200_000)
        report = verify(tmp_path / "out", tiny_models(family))
        assert report.problems == []
        assert report.notes == [f"{tmp_path / 'out'} keeps an adapter beside the base, {tiny_models(family)} does not"]
        assert verify(tmp_path / "out", tmp_path / "converted").notes == []
        back, kept = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out/adapter", tmp_path / "lora"))
        assert back.keys() == kept.keys()
        assert all(torch.equal(back[name], kept[name]) for name in kept)
        configs = [json.loads((at / "adapter_config.json").read_text()) for at in (tmp_path / "out/adapter", tmp_path / "lora")]
        assert configs[0] == configs[1]

    def test_its_keys_are_those_of_a_checkpoint_that_any_split_reads(self, tiny_models, tmp_path):
        adapter(tiny_models("qwen3_moe"), tmp_path / "lora")
        hf_to_megatron(tiny_models("qwen3_moe"), tmp_path / "converted", adapter_dir=tmp_path / "lora", keep_adapter=True)
        shapes = read_index(tmp_path / "converted/release").shapes
        assert shapes["decoder.layers.self_attention.linear_qkv.adapter.adapter_q.linear_in.weight"] == (4, 3, 64)
        assert shapes["decoder.layers.mlp.experts.experts.linear_fc2.adapter.linear_out.weight"] == (4, 8, 64, 3)

    def test_training_does_not_leave_it_out_in_silence(self, tiny_models, tmp_path):
        adapter(tiny_models("qwen3"), tmp_path / "lora")
        hf_to_megatron(tiny_models("qwen3"), tmp_path / "converted", adapter_dir=tmp_path / "lora", keep_adapter=True)
        hf = read_config(tmp_path / "converted")
        with pytest.raises(Refused, match="keeps an adapter beside the base, which would be left out here"):
            check_checkpoint(tmp_path / "converted", family_of(hf), hf)

    def test_it_must_belong_to_the_model(self, tiny_models, tmp_path):
        adapter(tiny_models("qwen3_moe"), tmp_path / "lora")
        for keep in (False, True):
            with pytest.raises(Refused, match="tensors that the model does not have"):
                hf_to_megatron(tiny_models("qwen3"), tmp_path / "out", adapter_dir=tmp_path / "lora", keep_adapter=keep)
        assert not (tmp_path / "out").exists()

    def test_nothing_to_keep(self, tiny_models, tmp_path):
        with pytest.raises(Refused, match="--keep-adapter: keeps the adapter of --adapter, which is not given"):
            hf_to_megatron(tiny_models("qwen3"), tmp_path / "out", keep_adapter=True)
