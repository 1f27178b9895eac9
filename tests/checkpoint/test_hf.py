"""Reading and writing Hugging Face folders: what is refused, and that nothing is changed on the way.

Not tested here: the way into and out of Megatron (tests/policy/test_families.py).
"""

import json
import shutil
import stat
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megapsft.checkpoint.hf import save_hf
from megapsft.checkpoint.hf_folder import INDEX, SINGLE, open_checkpoint, read_config
from megapsft.errors import Refused
from megapsft.models.families import family_of
from tests.checkpoint.folders import change, check
from tests.ranks import run_ranks

SIZES = dict(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=8)


@pytest.fixture
def model(tmp_path) -> Path:
    return make(tmp_path / "model", "Qwen3", num_key_value_heads=1)


def make(folder: Path, prefix: str, **options) -> Path:
    """A model folder in one file, with a companion or two."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**SIZES, **options)
    getattr(transformers, f"{prefix}ForCausalLM")(config).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.md").write_text("not to be copied")
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name, slice(None)) for name in checkpoint.shapes}


def stream(folder: Path):
    """The tensors of a folder in the order of export."""
    hf, stored = read_config(folder), tensors(folder)
    for rule in family_of(hf).parameters(hf):
        for name in rule.sources:
            yield name, stored[name]


def shard(folder: Path, **options) -> Path:
    """The folder written anew in several files."""
    out = folder.with_name("sharded")
    save_hf(stream(folder), read_config(folder), folder, out, max_shard_bytes=4000, **options)
    return out


class TestSave:
    def test_shards_hold_the_same_tensors_and_the_index_lists_them(self, model):
        out = shard(model)
        index = json.loads((out / INDEX).read_text())
        files = sorted(path.name for path in out.glob("*.safetensors"))
        assert len(files) > 2
        assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
        source, back = load_file(model / SINGLE), tensors(out)
        assert set(index["weight_map"]) == set(source) == set(back)
        assert all(torch.equal(back[name], source[name]) for name in source)
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in source.values())
        for file in files:
            held = load_file(out / file)
            assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 4000
        check(out)

    def test_one_file_has_no_index(self, model, tmp_path):
        save_hf(stream(model), read_config(model), model, tmp_path / "out")
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
            "chat_template.jinja", "config.json", "generation_config.json", SINGLE, "tokenizer.json",
        ]  # fmt: skip

    def test_everyone_may_read_the_files(self, model):
        for path in shard(model).glob("*.safetensors"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o644

    def test_transformers_reads_it(self, model):
        ids = torch.arange(10)[None]
        ours, theirs = (transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (shard(model), model))
        with torch.no_grad():
            assert torch.equal(ours(ids).logits, theirs(ids).logits)

    def test_dtype_is_that_of_the_tensors_and_config_says_so(self, model, tmp_path):
        hf = read_config(model)
        save_hf(stream(model), hf, model, tmp_path / "out", dtype=torch.bfloat16)
        config = json.loads((tmp_path / "out/config.json").read_text())
        assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")
        assert {tensor.dtype for tensor in tensors(tmp_path / "out").values()} == {torch.bfloat16}

    @pytest.mark.parametrize("stored", [False, True])
    def test_tied_output_layer_is_written_only_if_the_source_had_it(self, stored, tmp_path):
        folder = make(tmp_path / "model", "Llama", num_key_value_heads=2, tie_word_embeddings=True)
        if stored:
            change(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
        back, source = tensors(shard(folder)), load_file(folder / SINGLE)
        assert ("lm_head.weight" in back) == stored
        assert set(back) == set(source)
        assert all(torch.equal(back[name], source[name]) for name in source)

    def test_a_failure_leaves_nothing_behind(self, model, tmp_path):
        def breaks():
            yield from list(stream(model))[:3]
            raise OSError("disk gone")

        before = sorted(tmp_path.iterdir())
        with pytest.raises(OSError, match="disk gone"):
            save_hf(breaks(), read_config(model), model, tmp_path / "out")
        assert sorted(tmp_path.iterdir()) == before

    def test_what_a_killed_run_left_is_replaced_and_an_empty_folder_is_filled(self, model, tmp_path):
        out, left = tmp_path / "out", tmp_path / ".out.partial"
        out.mkdir()
        left.mkdir()
        (left / "half").write_text("")
        save_hf(stream(model), read_config(model), model, out)
        assert not left.exists()
        assert not (out / "half").exists()
        check(out)

    def test_refused_where_something_is_already(self, model):
        with pytest.raises(Refused, match="exists and is not an empty folder; name another folder"):
            save_hf(stream(model), read_config(model), model, model)

    def test_every_rank_is_refused_with_the_first_and_returns_with_it(self, model, tmp_path):
        for refused, finished in run_ranks(2, save_twice, model, tmp_path / "out"):
            assert "exists and is not an empty folder" in refused
            assert finished


def save_twice(model: Path, out: Path) -> tuple[str, bool]:
    """Runs on every rank: whether the folder is there after the first save, and what the second one refuses."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    hf = read_config(model)

    def mine():
        return ((name, tensor if dist.get_rank() == 0 else None) for name, tensor in stream(model))

    save_hf(mine(), hf, model, out)
    finished = (out / "config.json").is_file()
    try:
        save_hf(mine(), hf, model, out)
    except Refused as refusal:
        return str(refusal), finished
    return "", finished


class TestShardsWithoutIndex:
    @pytest.fixture
    def sharded(self, model) -> Path:
        (shard(model) / INDEX).unlink()
        return model.with_name("sharded")

    def test_they_are_read(self, sharded, model):
        check(sharded)
        source, found = load_file(model / SINGLE), tensors(sharded)
        assert found.keys() == source.keys()
        assert all(torch.equal(found[name], source[name]) for name in source)

    def test_one_that_is_missing(self, sharded):
        sorted(sharded.glob("*.safetensors"))[1].unlink()
        with pytest.raises(Refused, match="has no model.safetensors.index.json, and its files .* are not all of one numbering"):
            check(sharded)

    def test_one_of_another_export(self, sharded):
        first = sorted(sharded.glob("*.safetensors"))[0]
        shutil.copyfile(first, sharded / "model-00001-of-00002.safetensors")
        with pytest.raises(Refused, match="are not all of one numbering"):
            check(sharded)

    def test_a_tensor_in_two_of_them(self, sharded):
        first, second = sorted(sharded.glob("*.safetensors"))[:2]
        (name, tensor), *_ = load_file(first).items()
        save_file(load_file(second) | {name: tensor}, second)
        with pytest.raises(Refused, match=f"has tensors in two of its files: {name}"):
            check(sharded)


class TestRead:
    def test_slices(self, model):
        name, whole = "model.layers.1.self_attn.o_proj.weight", load_file(model / SINGLE)
        part = open_checkpoint(model).read(name, (slice(None), slice(3, 9)))
        assert torch.equal(part, whole[name][:, 3:9])

    def test_frequencies_that_old_versions_saved_are_passed_over(self, model):
        change(model, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
        check(model)

    def test_no_folder(self, tmp_path):
        with pytest.raises(Refused, match="is not a folder; name a local folder"):
            read_config(tmp_path / "absent")

    def test_no_config(self, tmp_path):
        with pytest.raises(Refused, match=r"config.json: is missing; name a complete"):
            read_config(tmp_path)

    @pytest.mark.parametrize(("text", "rule"), [("{", "is not readable JSON"), ("[]", "holds a JSON list")])
    def test_broken_config(self, text, rule, tmp_path):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(Refused, match=rule):
            read_config(tmp_path)

    def test_pickles(self, model):
        (model / SINGLE).rename(model / "pytorch_model.bin")
        with pytest.raises(Refused, match=r"pytorch_model.bin: is a pickle.*save_pretrained\(...\) writes safetensors"):
            check(model)

    def test_no_weights(self, model):
        (model / SINGLE).unlink()
        with pytest.raises(Refused, match="has neither model.safetensors nor model.safetensors.index.json"):
            check(model)

    @pytest.mark.parametrize("keep", [4, 100, -8])
    def test_truncated(self, keep, model):
        content = (model / SINGLE).read_bytes()
        (model / SINGLE).write_bytes(content[:keep])
        with pytest.raises(Refused, match=r"model.safetensors: is truncated or not safetensors \(.*; download"):
            check(model)

    def test_missing_shard(self, model):
        out = shard(model)
        file = next(out.glob("model-00002*"))
        file.unlink()
        with pytest.raises(Refused, match=f"{file.name}: is missing, but .*index.json lists it"):
            check(out)

    def test_shard_without_what_the_index_lists(self, model):
        out = shard(model)
        first, second = (next(out.glob(f"model-0000{number}*")) for number in (1, 2))
        shutil.copy(first, second)
        with pytest.raises(Refused, match=f"{second.name}: lacks tensors that .* lists in it: model"):
            check(out)

    def test_quantised_weights(self, model):
        change(model, lambda w: w.update({"model.norm.weight": w["model.norm.weight"].to(torch.float8_e4m3fn)}))
        with pytest.raises(Refused, match="1 FP8 tensors have no _scale_inv beside them: model.norm.weight"):
            check(model)

    def test_missing_tensor(self, model):
        change(model, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
        with pytest.raises(Refused, match="1 tensors are missing that config.json asks for: model.layers.1.mlp.up_proj.weight"):
            check(model)

    def test_missing_output_layer(self, model):
        change(model, lambda w: w.pop("lm_head.weight"))
        with pytest.raises(Refused, match="lm_head.weight; set tie_word_embeddings in config.json if they are tied"):
            check(model)

    def test_extra_tensors_are_named_up_to_five(self, model):
        change(model, lambda w: w.update({f"scale.{number}": torch.ones(1) for number in range(7)}))
        message = r"7 tensors are not part of the model .*: scale.0, scale.1, scale.2, scale.3, scale.4 \.\.\."
        with pytest.raises(Refused, match=message):
            check(model)

    def test_other_shape(self, model):
        change(model, lambda w: w.update({"model.norm.weight": torch.ones(17)}))
        with pytest.raises(Refused, match=r"model.norm.weight: has shape \[17\], but config.json makes it \[16\]"):
            check(model)

    def test_tied_but_different(self, tmp_path):
        folder = make(tmp_path / "model", "Qwen2", num_key_value_heads=2, tie_word_embeddings=True)
        change(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1}))
        with pytest.raises(Refused, match="lm_head.weight: differs from model.embed_tokens.weight, but config.json ties them"):
            check(folder)
