"""Hugging Face -> our import -> Megatron's own load, under a split -> Megatron's own save -> our export: the same bits.

Megatron's part runs on real ranks, into models that held nothing but NaN. Not here: Transformer Engine's layers (only the keys
that they ask for), FP8, adapters.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import transformers
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.extensions import transformer_engine_spec_provider as provider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megapsft.checkpoint.convert.hf_to_megatron import hf_to_megatron
from megapsft.checkpoint.convert.megatron_to_hf import megatron_to_hf
from megapsft.checkpoint.dist import load_model, model_state
from megapsft.checkpoint.files.torch_dist import check_harmless, read_index
from megapsft.checkpoint.hf_folder import read_config
from megapsft.config import load_config
from megapsft.models.families import family_of
from megapsft.models.stored_names import extra_states
from megapsft.parallel import initialize, shutdown
from megapsft.platform.compat import save_checkpoint
from megapsft.policy.build import unwrap
from megapsft.train.loop import train
from megapsft.train.plan import plan_run
from megapsft.train.start import start as start_run
from tests.checkpoint.convert.folders import assert_same_tensors, make_model, tensors_in
from tests.policy.test_families import VOCAB, start, token_ids
from tests.ranks import run_ranks

TP2 = dict(tensor_model_parallel_size=2)
SP = dict(sequence_parallel=True)
PP2 = dict(pipeline_model_parallel_size=2)
VPP2 = dict(virtual_pipeline_model_parallel_size=2)
EP2 = dict(expert_model_parallel_size=2)
ETP1 = dict(expert_tensor_parallel_size=1)
CASES = [  # model, dtype, in many files, ranks, split
    ("qwen3", "float32", True, 1, {}),
    ("qwen3-moe", "float32", False, 1, {}),
    ("qwen2-tied", "float32", True, 1, {}),
    ("llama", "float32", False, 1, {}),
    ("qwen3-tied", "bfloat16", False, 2, TP2 | SP),
    ("llama-tied", "bfloat16", True, 2, PP2),
    ("qwen2", "bfloat16", False, 2, PP2 | VPP2),
    ("qwen3-moe", "bfloat16", True, 2, EP2),
    ("qwen3-moe-tied", "bfloat16", False, 2, TP2 | SP | EP2 | ETP1),
]
NO_GROUPS = dict(tp_group=Mock(), dp_cp_group=Mock())  # not asked for objects
EMBEDDING = "embedding.word_embeddings.weight"


def through_megatron(converted: Path, saved: Path, world_size: int, split: dict, dtype: str):
    """Runs on every rank: (all was filled, logits [2, 48, VOCAB] of one rank)."""
    chunks, hf = start(converted, world_size, split, dtype)
    models = [unwrap(chunk) for chunk in chunks]
    load_model(converted / "release", models)
    filled = all(parameter.isfinite().all() for model in models for parameter in model.parameters())
    logits = None
    if world_size == 1:
        ids = token_ids()
        with torch.no_grad():
            logits = models[0].eval()(ids, torch.arange(48).expand_as(ids), None)[..., :VOCAB].numpy()
    saved.mkdir(exist_ok=True)
    save_checkpoint({"model": model_state(models)}, str(saved))
    shutdown()
    return filled, logits


@pytest.mark.parametrize(("name", "dtype", "shards", "world_size", "split"), CASES, ids=str)
def test_there_and_back_through_megatron_under_a_split(name, dtype, shards, world_size, split, tmp_path):
    source = make_model(name, tmp_path / "hf", getattr(torch, dtype), shards)
    hf_to_megatron(source, tmp_path / "converted")
    assert read_index(tmp_path / "converted" / "release").shapes[EMBEDDING] == (VOCAB, 64)

    results = run_ranks(world_size, through_megatron, tmp_path / "converted", tmp_path / "saved", world_size, split, dtype)
    assert all(filled for filled, _ in results)
    saved = read_index(tmp_path / "saved")
    assert saved.shapes[EMBEDDING][0] > VOCAB  # else the removal of the padding was not tried
    check_harmless(tmp_path / "saved", saved)

    megatron_to_hf(tmp_path / "saved", tmp_path / "back", source, max_shard_bytes=10**5 if shards else 5 * 10**9)
    assert_same_tensors(tmp_path / "back", source)
    megatron_to_hf(tmp_path / "converted", tmp_path / "direct")  # what the import wrote, without Megatron between
    assert_same_tensors(tmp_path / "direct", source)
    if world_size == 1:
        expected = logits_of(source)
        assert torch.equal(logits_of(tmp_path / "back"), expected)
        torch.testing.assert_close(torch.from_numpy(results[0][1]), expected, atol=1e-4, rtol=0)


def logits_of(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(token_ids()).logits


def test_a_run_with_a_distributed_optimizer_is_exported_without_it(tiny_models, tiny_data, tmp_path):
    source = tiny_models("qwen3_moe")
    hf_to_megatron(source, tmp_path / "converted", "bf16")
    options = [
        f"model.path={tmp_path / 'converted'}", f"data.path={tiny_data}", "data.columns.prompt=question",
        "data.columns.demonstration=answer", f"run.dir={tmp_path / 'run'}", "model.dtype=bfloat16", "objective.name=sft",
        "train.steps=1", "train.batch_size=4", "optimizer.lr=0", "checkpoint.interval=1", "log.progress=false",
        "log.tensorboard=false", "data.pack_length=256", "parallel.use_distributed_optimizer=true",
        "parallel.expert_model_parallel_size=2",
    ]  # fmt: skip
    run_ranks(2, trained, options)
    checkpoint = read_index(tmp_path / "run" / "checkpoints" / "latest")
    assert any(key.startswith("optimizer.") or "exp_avg" in key for key in checkpoint.shapes)
    megatron_to_hf(tmp_path / "run", tmp_path / "back")
    megatron_to_hf(tmp_path / "converted", tmp_path / "rounded")
    assert_same_tensors(tmp_path / "back", tmp_path / "rounded")
    for name, tensor in tensors_in(source).items():
        assert torch.equal(tensors_in(tmp_path / "rounded")[name], tensor.bfloat16()), name
    manifest = json.loads((tmp_path / "back" / "conversion.json").read_text())
    assert (manifest["step"], manifest["dtype"]) == (1, "bfloat16")
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


def trained(options: list[str]) -> None:
    config = load_config(None, options)
    plan = plan_run(config, int(os.environ["WORLD_SIZE"]))
    initialize(plan.mesh, config.parallel, config.train.seed)
    train(start_run(plan))
    shutdown()


def strictly(converted: Path):
    """Runs on one rank: what Megatron finds too much and too little in the checkpoint; whether its default fills all."""
    chunks, _ = start(converted, 1, {})
    models = [unwrap(chunk) for chunk in chunks]
    path = str(converted / "release")
    loaded = dist_checkpointing.load({"model": model_state(models)}, path)
    models[0].load_state_dict(loaded["model"]["chunk0"], strict=True)
    filled = all(parameter.isfinite().all() for parameter in models[0].parameters())
    _, missing, unexpected = dist_checkpointing.load({"model": model_state(models)}, path, strict=StrictHandling.RETURN_ALL)
    asked = {entry.unique_key for entry in model_state(models)["chunk0"].values() if "_extra_state" in entry.key}
    shutdown()
    return filled, missing, unexpected, asked


@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe"])
def test_megatrons_strictest_load_finds_nothing_amiss_but_the_extra_states_of_the_other_kind_of_layers(name, tmp_path):
    hf_to_megatron(make_model(name, tmp_path / "hf"), tmp_path / "converted")
    [(filled, missing, unexpected, asked)] = run_ranks(1, strictly, tmp_path / "converted")
    assert filled
    assert unexpected == set()
    assert all(key.endswith("._extra_state") for key in missing)
    assert asked
    assert asked <= set(extra_states(read_config(tmp_path / "converted")))


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "qwen3-moe"])
def test_the_extra_states_that_transformer_engines_layers_ask_for_are_there(name, tmp_path, monkeypatch):
    hf_to_megatron(make_model(name, tmp_path / "hf"), tmp_path / "converted")
    hf = read_config(tmp_path / "converted")
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", provider.TESpecProvider, raising=False)
    monkeypatch.setattr(provider, "is_te_min_version", lambda version: True)  # as if it were installed
    spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
        hf.num_experts, moe_grouped_gemm=False, qk_layernorm=family_of(hf).qk_layernorm
    )
    modules = transformer_engine_modules(spec)
    assert {module.split(".")[0] for module in modules} >= {"self_attention", "mlp"}
    asked = {"decoder.final_layernorm._extra_state/shard_0_1"}
    for module in modules:
        for layer in range(hf.num_hidden_layers):
            for expert in range(hf.num_experts) if "experts" in module else (None,):
                offsets = [(0, layer, hf.num_hidden_layers)] + ([] if expert is None else [(1, expert, hf.num_experts)])
                prefix = f"decoder.layers.{module}."
                made = make_sharded_tensors_for_checkpoint({"_extra_state": None}, prefix, sharded_offsets=offsets, **NO_GROUPS)
                asked.add(made[f"{prefix}_extra_state"].unique_key)
    assert asked <= set(read_index(tmp_path / "converted" / "release").objects)


def transformer_engine_modules(spec: ModuleSpec | partial, at: str = "") -> list[str]:
    """Names in a layer, as in a checkpoint, of all modules of Transformer Engine that have an extra state.

    Its attention has none there: Megatron's TEDotProductAttention.sharded_state_dict leaves it out. Without Transformer Engine
    the classes that derive from its own are mocks. Newer Megatron has partials instead of some specs.
    """
    found, newer = [], isinstance(spec, partial)
    kind, submodules = (spec.func, spec.keywords["submodules"]) if newer else (spec.module, spec.submodules)
    for part, module in vars(submodules).items():
        name = f"{at}experts.{part}" if kind.__name__ == "SequentialMLP" else f"{at}{part}"
        if part in ("core_attention", "shared_experts"):
            continue
        if isinstance(module, (ModuleSpec, partial)):
            found += transformer_engine_modules(module, f"{name}.")
        elif isinstance(module, Mock) or getattr(module, "__module__", "").endswith("extensions.transformer_engine"):
            found.append(name)
    return found
