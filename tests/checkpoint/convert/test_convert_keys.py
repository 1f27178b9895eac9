"""Keys of checkpoints: those that we write, and the other spellings that are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megapsft.checkpoint.convert.hf_to_megatron import hf_to_megatron
from megapsft.checkpoint.convert.megatron_to_hf import megatron_to_hf
from megapsft.checkpoint.files.torch_dist import FORMAT, STORED_FORMAT, read_index, write_metadata
from megapsft.errors import Refused
from megapsft.models.stored_names import FUSED
from tests.checkpoint.convert.folders import assert_same_tensors, make_model, tensors_in

NORM, FUSED_NORM = "decoder.layers.pre_mlp_layernorm.weight", "decoder.layers.mlp.linear_fc1.layer_norm_weight"
HEADS, GROUPS, DIM, EXPERTS, LAYERS = 4, 2, 24, 8, 4  # of the models


def test_the_norm_before_experts_has_the_key_that_both_kinds_of_layers_load(tmp_path):
    hf_to_megatron(make_model("qwen3-moe", tmp_path / "moe"), tmp_path / "sparse")
    hf_to_megatron(make_model("qwen3", tmp_path / "hf"), tmp_path / "dense")
    sparse, dense = (read_index(tmp_path / name / "release").shapes for name in ("sparse", "dense"))
    assert NORM in sparse
    assert FUSED_NORM not in sparse
    assert FUSED_NORM in dense
    assert NORM not in dense
    assert "decoder.layers.self_attention.linear_qkv.layer_norm_weight" in sparse.keys() & dense.keys()


def renamed(release: Path, names: dict[str, str]) -> None:
    """The checkpoint with other keys for some tensors."""
    index = read_index(release)
    shapes, dtypes, chunks = (
        {names.get(key, key): value for key, value in table.items()} for table in (index.shapes, index.dtypes, index.chunks)
    )
    write_metadata(release, shapes, dtypes, chunks, index.objects)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("qwen3-moe", NORM, FUSED_NORM),
        ("qwen3", FUSED_NORM, NORM),
        ("qwen3-moe", f"decoder.layers.{FUSED['input_layernorm.weight']}", "decoder.layers.input_layernorm.weight"),
    ],
)
def test_norms_are_read_where_local_and_fused_layers_file_them(name, old, new, tmp_path):
    source = make_model(name, tmp_path / "hf")
    hf_to_megatron(source, tmp_path / "converted")
    renamed(tmp_path / "converted" / "release", {old: new})
    assert new in read_index(tmp_path / "converted" / "release").shapes
    megatron_to_hf(tmp_path / "converted", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", source)


def by_hand(source: Path) -> dict[str, torch.Tensor]:
    """What Megatron has for the model, with keys for each layer and each expert; written without our tables."""
    hf = tensors_in(source)
    found = {
        "embedding.word_embeddings.weight": torch.cat([hf["model.embed_tokens.weight"], torch.full((5, 64), 9.0)]),  # padded
        "output_layer.weight": hf["lm_head.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
    }
    for layer in range(LAYERS):
        at, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        q, k, v = (hf[f"{theirs}.self_attn.{part}_proj.weight"] for part in "qkv")
        groups = zip(q.chunk(GROUPS), k.chunk(GROUPS), v.chunk(GROUPS), strict=True)
        found[f"{at}.self_attention.linear_qkv.weight"] = torch.cat([torch.cat(group) for group in groups])
        found[f"{at}.self_attention.linear_qkv.layer_norm_weight"] = hf[f"{theirs}.input_layernorm.weight"]
        found[f"{at}.self_attention.linear_proj.weight"] = hf[f"{theirs}.self_attn.o_proj.weight"]
        for part in "qk":
            found[f"{at}.self_attention.{part}_layernorm.weight"] = hf[f"{theirs}.self_attn.{part}_norm.weight"]
        found[f"{at}.pre_mlp_layernorm.weight"] = hf[f"{theirs}.post_attention_layernorm.weight"]
        found[f"{at}.mlp.router.weight"] = hf[f"{theirs}.mlp.gate.weight"]
        for expert in range(EXPERTS):
            of = {part: hf[f"{theirs}.mlp.experts.{expert}.{part}_proj.weight"] for part in ("gate", "up", "down")}
            found[f"{at}.mlp.experts.experts.{expert}.linear_fc1.weight"] = torch.cat([of["gate"], of["up"]])
            found[f"{at}.mlp.experts.experts.{expert}.linear_fc2.weight"] = of["down"]
    return found


def save(tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    dcp.save(tensors, checkpoint_id=folder, no_dist=True)
    (folder / FORMAT).write_text(json.dumps(STORED_FORMAT))
    return folder


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_keys_of_each_layer_and_each_expert_are_read(tmp_path):
    source = make_model("qwen3-moe", tmp_path / "hf")
    megatron_to_hf(save(by_hand(source), tmp_path / "saved"), tmp_path / "back", source)
    assert_same_tensors(tmp_path / "back", source)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_layers_and_experts_in_one_piece_are_refused_rather_than_read_wrongly(tmp_path):
    source = make_model("qwen3-moe", tmp_path / "hf")
    tensors = by_hand(source)
    key = "decoder.layers.{}.mlp.experts.experts.{}.linear_fc2.weight"
    for layer in range(LAYERS):
        stacked = torch.stack([tensors.pop(key.format(layer, expert)) for expert in range(EXPERTS)])
        tensors[f"decoder.layers.{layer}.mlp.experts.experts.linear_fc2.weight"] = stacked
    with pytest.raises(Refused, match="has chunks of several layers or experts in one; save the checkpoint with Megatron's own"):
        megatron_to_hf(save(tensors, tmp_path / "saved"), tmp_path / "back", source)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("decoder.layers.0.mlp.shared_experts.linear_fc1.weight", "holds 1 parameters that Qwen3MoeForCausalLM does not have"),
        ("optimizer.state.exp_avg.decoder.final_layernorm.weight", None),
        ("critic.decoder.final_layernorm.weight", None),
    ],
)
def test_parameters_that_the_model_does_not_have_are_refused_and_other_states_are_not(key, message, tmp_path):
    source = make_model("qwen3-moe", tmp_path / "hf")
    saved = save({**by_hand(source), key: torch.ones(64)}, tmp_path / "saved")
    if message is None:
        megatron_to_hf(saved, tmp_path / "back", source)
        assert_same_tensors(tmp_path / "back", source)
        return
    with pytest.raises(Refused, match=message):
        megatron_to_hf(saved, tmp_path / "back", source)
