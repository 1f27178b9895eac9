"""Errors at the door: one message says the value, the rule it breaks and the remedy, and nothing has been started or written.

Each error comes through the door that a user uses: `plan_run(load_config(...))`, which is what `megapsft train` does first, or
the command line itself. Not here: what a config.json or a chat template may say (tests/models, tests/data).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megapsft.checkpoint.export import export_run
from megapsft.checkpoint.hf import export_stream, read_config
from megapsft.checkpoint.hf_folder import INDEX, SINGLE, open_checkpoint
from megapsft.checkpoint.hf_save import save_hf
from megapsft.config import ParallelConfig, load_config
from megapsft.data.arithmetic import preferences, read_problems, rollouts, write_jsonl
from megapsft.errors import Refused, TrainingStopped
from megapsft.parallel import initialize, plan_mesh, shutdown
from megapsft.policy.build import model_shape
from megapsft.train.loop import train
from megapsft.train.plan import plan_run
from megapsft.train.start import start
from tests.command import megapsft
from tests.ranks import run_ranks

SMALL = (
    "data.columns.prompt=question", "data.columns.demonstration=answer", "data.max_length=512", "data.pack_length=1024",
    "model.dtype=float32", "train.batch_size=8", "train.minibatch_size=4", "train.steps=2", "log.tensorboard=false",
    "log.progress=false", "checkpoint.async_save=false",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Overrides, and parts of what they are told: the value, the rule, the remedy."""

    name: str
    overrides: str
    value: str
    rule: str
    remedy: str
    world: int = 1
    family: str = "qwen3"


TP, CP = "parallel.tensor_model_parallel_size", "parallel.context_parallel_size"
PP, VPP = "parallel.pipeline_model_parallel_size", "parallel.virtual_pipeline_model_parallel_size"
EP, ETP = "parallel.expert_model_parallel_size", "parallel.expert_tensor_parallel_size"
MOE = "qwen3_moe"

CONFIG = [
    Case("unknown key", "train.stpes=3", "train.stpes", "is not a config key",
         "did you mean 'steps'? known keys here: steps, batch_size"),
    Case("unknown section", "trian.steps=3", "trian", "is not a config key", "did you mean 'train'? known keys here: run, model"),
    Case("unknown column key", "data.columns.promt=q", "data.columns.promt", "is not a config key",
         "did you mean 'prompt'? known keys here: prompt"),
    Case("wrong type", "train.steps=many", "train.steps=many", "should be a valid integer", "megapsft config"),
    Case("a number that is true", "lora.rank=true", "lora.rank=true", "is not a number", "megapsft config"),
    Case("a text for a list", "lora.target_modules=q_proj", "lora.target_modules=q_proj", "is not a list", "such as [a,b]"),
    Case("a list that is too short", "profile.steps=[2]", "profile.steps=[2]", "has too few values", "megapsft config"),
    Case("section that is a number", "train=3", "train=3", "should be a dictionary", "megapsft config"),
    Case("number out of range", "train.steps=0", "train.steps=0", "greater than 0", "megapsft config"),
    Case("infinite learning rate", "optimizer.lr=.inf", "optimizer.lr=inf", "should be a finite number", "megapsft config"),
    Case("not one of the choices", "model.dtype=fp16", "model.dtype=fp16", "'float32' or 'bfloat16'", "megapsft config"),
    Case("no override", "train.steps", "'train.steps'", "is not an override", "write key=value, for example train.steps=200"),
    Case("override without a key", "=3", "'=3'", "is not an override", "write key=value"),
    Case("override that is not YAML", "train.steps=[", "'train.steps=['", "has a value that is not YAML", "quote the value"),
    Case("no model", "model.path=", "model.path=''", "names no model", "`megapsft init-model` makes a small one"),
    Case("no data", "data.path=", "data.path=''", "names no data", "give a .jsonl or .parquet file"),
    Case("no such model", "model.path=/nowhere", "model folder '/nowhere'", "is not a folder", "name a local folder"),
    Case("no such data", "data.path=no.jsonl", "data.path='no.jsonl'", "is not a file", "set data.path"),
    Case("unknown objective", "objective.name=psfd", "objective.name='psfd'", "is not known",
         "did you mean 'psft'? known: cispo, dapo, "),
    Case("unknown option", "objective.clip_hihg=1", "objective.clip_hihg", "is not an option of PSFT",
         "did you mean 'clip_high'?"),
    Case("option of another", "objective={name: sft, clip_high: 1}", "objective.clip_high", "is not an option of SFT", "known: "),
    Case("minibatch", "train.minibatch_size=3", "train.minibatch_size=3", "must divide train.batch_size=8", "use 2"),
    Case("too long for the model", "data.max_length=5000", "data.max_length=5000", "exceeds max_position_embeddings=4096",
         "use data.max_length=4096 or less"),
    Case("all rows too long", "data.max_length=8", "data.max_length=8", "drops all 64 rows", "raise it; the longest row has"),
    Case("no run.dir", "run.dir=", "run.dir=''", "names no folder", "give one such as runs/first"),
    Case("unknown best metric", "checkpoint.keep_best=true checkpoint.best_metric=train/los", "checkpoint.best_metric=train/los",
         "is not a metric", "use one of train/loss"),
    Case("nothing to recompute", "parallel.recompute_granularity=selective parallel.recompute_modules=[]",
         "recompute_modules=[]", "names nothing to recompute", "use some of core_attn"),
    Case("experts to recompute", "parallel.recompute_granularity=selective parallel.recompute_modules=[moe]",
         "recompute_modules=moe", "the model has no experts", "use core_attn, mlp or layernorm"),
    Case("unknown recompute module", "parallel.recompute_modules=[core_attention]", "recompute_modules=core_attention",
         "is not known", "use some of core_attn, mlp, moe, layernorm"),
]  # fmt: skip

SPLIT = [
    Case("heads", f"{TP}=3", "tensor_model_parallel_size=3", "must divide num_attention_heads=4", "use 1, 2", 3),
    Case("kv heads", f"{TP}=4", "tensor_model_parallel_size=4", "must divide num_query_groups (key-value heads)=2",
         "use 1, 2", 4),
    Case("layers", f"{PP}=3", "pipeline_model_parallel_size=3", "must divide num_layers=4", "use 1, 2, 4", 3),
    Case("virtual layers", f"{PP}=2 {VPP}=3", "pipeline x virtual pipeline size=6", "must divide num_layers=4", "use 1, 2, 4", 2),
    Case("virtual stages of one", f"{VPP}=2", "virtual_pipeline_model_parallel_size=2", "needs pipeline_model_parallel_size > 1",
         "leave it out, or split"),
    Case("experts", f"{EP}=3", "expert_model_parallel_size=3", "must divide num_experts=8", "use 1, 2, 4, 8", 3, MOE),
    Case("expert ffn", f"{EP}=2 {ETP}=3", "expert_tensor_parallel_size=3", "must divide moe ffn_hidden_size=64",
         "use 1, 2, 4", 6, MOE),
    Case("expert sizes without experts", f"{EP}=2", "expert_model_parallel_size=2", "the model has no experts",
         "leave both out", 2),
    Case("expert split without experts", f"{ETP}=2", "expert_tensor_parallel_size=2", "the model has no experts",
         "leave both out", 2),
    Case("world", f"{TP}=2 {CP}=2", "world size 6", "must be a multiple of tensor 2 x pipeline 1 x context 2 = 4",
         "start 4 processes, or a multiple (--nproc-per-node 4)", 6),
    Case("world of experts", f"{EP}=4", "world size 2", "must be a multiple of expert tensor 1 x expert 4 x pipeline 1 = 4",
         "start 4 processes", 2, MOE),
    Case("experts not marked as such", f"{TP}=2 {ETP}=1", "expert_tensor_parallel_size=1 with expert_model_parallel_size=1",
         "must equal tensor_model_parallel_size=2", "use expert_tensor_parallel_size=2, or expert_model_parallel_size=2", 2, MOE),
    Case("batched transfers of virtual stages", f"{PP}=2 {VPP}=2 parallel.batch_p2p_comm=true", "batch_p2p_comm=True",
         "gives wrong gradients in silence", "leave both out, or use overlap_p2p_comm=true batch_p2p_comm=false", 2),
    Case("virtual stages without overlap", f"{PP}=2 {VPP}=2 parallel.overlap_p2p_comm=false", "overlap_p2p_comm=False",
         "gives wrong gradients in silence", "leave both out", 2),
    Case("both kinds of transfers", f"{PP}=2 parallel.overlap_p2p_comm=true parallel.batch_p2p_comm=true",
         "overlap_p2p_comm=True, batch_p2p_comm=True", "exclude each other", "leave batch_p2p_comm out", 2),
    Case("experts without sequence parallelism", f"{TP}=2 parallel.sequence_parallel=false", "sequence_parallel=False",
         "only with sequence parallelism", "leave sequence_parallel out, or set it to true", 2, MOE),
    Case("sequence parallelism of one", "parallel.sequence_parallel=true", "sequence_parallel=True",
         "needs tensor_model_parallel_size > 1", "set sequence_parallel=false"),
    Case("gather without ZeRO-1", "parallel.overlap_param_gather=true parallel.overlap_grad_reduce=true",
         "overlap_param_gather=True", "needs use_distributed_optimizer and overlap_grad_reduce",
         "set both to true, or overlap_param_gather=false"),
]  # fmt: skip


OTHER_MODELS = [
    Case("noise of no ratio", "objective.name=sft train.max_noise_clipped=0.01", "train.max_noise_clipped=0.01",
         "is of ratios that a clip range cuts, and objective.name=sft as configured has none", "leave it out"),
    Case("noise of no old pass", "train.minibatch_size=8 train.max_noise_clipped=0.01", "train.max_noise_clipped=0.01",
         "objective.name=psft as configured has none that differ from 1", "several updates a step"),
    Case("rows of another kind", "objective.name=grpo", "data.kind=demonstrations", "is not what grpo trains on",
         "use data.kind=rollouts"),
    Case("reference of none", "reference.placement=copy", "reference.placement=copy", "objective.name=psft has none",
         "leave reference out"),
    Case("critic of none", "critic.lr=1e-3", "critic.lr=0.001", "objective.name=psft has none", "leave critic out"),
    Case("swapped while gathered", "objective.name=iw_sft parallel.use_distributed_optimizer=true "
         "parallel.overlap_grad_reduce=true parallel.overlap_param_gather=true", "reference.placement=swap",
         "may still be gathering", "use reference.placement=copy", 2),
    Case("balance without experts", "model.moe_aux_loss_coeff=0.1", "model.moe_aux_loss_coeff=0.1", "is of experts",
         "leave it out"),
    Case("replay without experts", "model.moe_routing_replay=true", "model.moe_routing_replay=True", "is of experts",
         "leave it out"),
    Case("replay of no old policy", "objective.name=sft model.moe_routing_replay=true", "model.moe_routing_replay=true",
         "objective.name=sft has no old policy", "choose an objective with a ratio", 1, MOE),
    Case("layers without a GPU", "model.transformer_impl=transformer_engine model.dtype=bfloat16",
         "model.transformer_impl=transformer_engine", "needs a CUDA GPU", "train where there is one (docs/gpu.md)"),
    Case("FP8 without a GPU", "fp8.format=hybrid model.dtype=bfloat16", "fp8.format=hybrid", "needs a CUDA GPU", "leave fp8 out"),
    Case("FP8 of none", "fp8.recipe=delayed", "fp8.recipe=delayed", "is of FP8, and fp8.format=null", "leave it out"),
    Case("kernels without a GPU", "model.logprob_backend=triton", "model.logprob_backend=triton", "needs ", "auto or torch"),
    Case("options of no adapters", "lora.alpha=8", "lora.alpha=8.0", "lora.rank=null has none", "set lora.rank, such as 16"),
    Case("adapters of nothing", "lora.rank=4 lora.target_modules=[]", "lora.target_modules=[]", "names none",
         "use some of q_proj"),
    Case("adapters twice", "lora.rank=4 lora.target_modules=[q_proj,q_proj]", "lora.target_modules=[q_proj,q_proj]",
         "names one twice", "use some of q_proj, k_proj"),
    Case("adapters of what is no projection", "lora.rank=4 lora.target_modules=[lm_head]", "lora.target_modules.0=lm_head",
         "should be 'q_proj'", "megapsft config"),
    Case("rank that is not split", f"lora.rank=3 {TP}=2", "lora.rank=3",
         "is not divided by parallel.tensor_model_parallel_size=2", "use lora.rank=4", 2),
    Case("rank of experts that is not split", f"lora.rank=3 {EP}=2 {ETP}=2 model.moe_token_dispatcher_type=allgather",
         "lora.rank=3", "is not divided by parallel.expert_tensor_parallel_size=2", "use lora.rank=4", 4, MOE),
    Case("adapters beside another reference", "lora.rank=4 objective.name=iw_sft reference.path=elsewhere",
         "reference.path=elsewhere", "the reference is this one with its adapters as they were", "lora.rank=null"),
    Case("adapters and a critic", "lora.rank=4 objective.name=ppo", "lora.rank=4", "objective.name=ppo a critic",
         "use an objective without one"),
    Case("selection of demonstrations", "data.select=rft", "data.select=rft", "chooses among rollouts", "use data.kind=rollouts"),
]  # fmt: skip


@pytest.fixture
def refused(tiny_models, tiny_data, tmp_path) -> Callable[..., Refused]:
    """What `megapsft train` with these overrides is told; it has then written nothing."""

    def ask(*overrides: str, world: int = 1, **paths: Path) -> Refused:
        folder = paths.pop("run", tmp_path / "run")
        files = {"model": tiny_models("qwen3"), "data": tiny_data} | paths
        before = contents(folder)
        with pytest.raises(Refused) as caught:
            plan_run(configured(files["model"], files["data"], folder, *overrides), world)
        assert contents(folder) == before
        return caught.value

    return ask


def says(error: Refused, value: str, rule: str, remedy: str) -> None:
    assert value in error.value
    assert rule in error.rule
    assert remedy in error.remedy
    assert str(error) == f"{error.value}: {error.rule}; {error.remedy}"
    assert "\n" not in str(error)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CONFIG + SPLIT + OTHER_MODELS, ids=lambda case: case.name)
def test_what_cannot_be(case, refused, tiny_models):
    overrides = [case.overrides] if "{" in case.overrides else case.overrides.split()
    says(refused(*overrides, world=case.world, model=tiny_models(case.family)), case.value, case.rule, case.remedy)


def test_a_reference_of_another_architecture(refused, tiny_models):
    path = tiny_models("qwen3_moe")
    error = refused("objective.name=iw_sft", f"reference.path={path}")
    says(error, f"reference.path={path}", "is of another architecture than", "name one like it")


PLAIN = ("data.columns.prompt=prompt", "data.columns.demonstration=demonstration")


def test_sides_of_a_preference_that_share_no_microbatch(refused, tiny_data, tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", preferences(read_problems(tiny_data), 0))
    dpo = [*PLAIN, "objective.name=dpo", "data.kind=preferences", "data.packing=false"]
    error = refused(*dpo, "data.micro_batch_size=3", data=tmp_path / "pairs.jsonl")
    says(error, "data.micro_batch_size=3", "cannot hold the two sides of a preference", "use a multiple of 2")
    error = refused(*dpo, "data.micro_batch_size=2", "train.sft_warmup_steps=3", data=tmp_path / "pairs.jsonl")
    says(error, "data.kind=preferences", "is not what sft trains on (train.sft_warmup_steps=3)", "or another objective")


def test_importance_sampling_without_what_it_compares_with(refused, tiny_data, tmp_path):
    write_jsonl(tmp_path / "rollouts.jsonl", rollouts(read_problems(tiny_data), 0, each=2))
    error = refused(*PLAIN, "objective.name=grpo", "objective.tis=token", "data.kind=rollouts", data=tmp_path / "rollouts.jsonl")
    says(error, "rollouts of", "have no logprobs of the engine that sampled them", "set objective.tis=off")


def test_rows_without_anything_to_train(refused, tiny_data, tmp_path):
    rows = [row | {"rollouts": row["rollouts"]} for row in rollouts(read_problems(tiny_data), 0, each=1)]
    for row in rows:
        row["rollouts"][0]["response"] = "so " * 600  # longer than data.max_length: what is left is the demonstration
    write_jsonl(tmp_path / "rollouts.jsonl", rows)
    error = refused(*PLAIN, "objective.name=grpo", "data.kind=rollouts", data=tmp_path / "rollouts.jsonl")
    says(error, "64 rows of", "hold nothing that grpo trains", "use other rows")


def test_what_does_nothing_is_said_before_it_starts(tiny_models, tiny_data, tmp_path):
    write_jsonl(tmp_path / "rollouts.jsonl", rollouts(read_problems(tiny_data), 0, each=1))
    rows, model = tmp_path / "rollouts.jsonl", tiny_models("qwen3")
    recorded = [*PLAIN, "data.kind=rollouts"]

    def notes(*overrides: str, data: Path = rows) -> str:
        return "\n".join(plan_run(configured(model, data, tmp_path / "run", *overrides), 1).notes)

    assert "psft is sft by construction" in notes("train.minibatch_size=8", data=tiny_data)
    assert "every ratio is 1" in notes(*recorded, "objective.name=grpo", "train.minibatch_size=8")
    assert "rewards say nothing there" in notes(*recorded, "objective.name=grpo")
    assert "it imitates wrong rollouts too" in notes(*recorded, "objective.name=sft")
    assert "swapped in (reference.placement=swap)" in notes("objective.name=iw_sft", data=tiny_data)
    assert "a second model on the device" in notes("objective.name=iw_sft", "reference.placement=copy", data=tiny_data)


def test_the_order_of_overrides_loses_none():
    given = ["objective.name=sft", "objective.aggregation=token-sum"]
    first, last = (load_config(None, overrides).objective for overrides in (given, given[::-1]))
    assert first == last == {"name": "sft", "aggregation": "token-sum"}


def test_a_dense_ffn_that_is_not_divided(refused, tiny_models, tmp_path):
    model = changed_config(tiny_models("qwen3"), tmp_path, intermediate_size=127)
    says(refused(f"{TP}=2", model=model, world=2), "tensor_model_parallel_size=2", "must divide ffn_hidden_size=127", "use 1")


def test_uneven_gathers_are_refused_where_there_is_only_gloo(tiny_models):
    shape = model_shape(read_config(tiny_models(MOE)))
    split = ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=2)
    with pytest.raises(Refused) as caught:
        plan_mesh(split, 4, shape, on_cuda=False)
    says(
        caught.value,
        "expert_tensor_parallel_size=2 with expert_model_parallel_size=2 and alltoall dispatch",
        "needs an uneven all-gather, which gloo lacks",
        "use expert_tensor_parallel_size=1, or model.moe_token_dispatcher_type=allgather",
    )
    plan_mesh(split, 4, shape, on_cuda=False, dispatcher="allgather")
    plan_mesh(split, 4, shape, on_cuda=True)


# --- data


@pytest.mark.parametrize(
    ("line", "value", "rule", "remedy"),
    [
        ('{"question": "2 + 2?"}', ":2: column 'answer'", "is missing; the row has: question", "data.columns.demonstration=NAME"),
        ('{"prompt": "2 + 2?", "answer": "4"}', ":2: column 'question'", "is missing; the row has: prompt, answer", "=NAME"),
        ('{"question": "2 + 2?", ', ":2", "is not a line of JSON", "write one JSON object a line"),
        ('["2 + 2?", "4"]', ":2", "is a JSON list, not an object", "write one JSON object a line"),
        ('{"question": "2 + 2?", "answer": " "}', ":2: column 'answer'", "is empty or blank", "fill it, or delete the row"),
        ('{"question": "2 + 2?", "answer": 4}', ":2: column 'answer'", "is a int", "write a string"),
    ],
    ids=["no demonstration", "no prompt", "not JSON", "not an object", "empty demonstration", "number"],
)
def test_a_row_is_named_by_file_and_line(line, value, rule, remedy, refused, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "1 + 1?", "answer": "2"}\n' + line + "\n")
    says(refused(data=data), f"{data}{value}", rule, remedy)


def test_a_tokenizer_without_a_chat_template(refused, tiny_models, tmp_path):
    model = copied(tiny_models("qwen3"), tmp_path)
    (model / "chat_template.jinja").unlink()
    rule = f"the tokenizer in {str(model)!r} has no chat template"
    says(refused(model=model), "chat_template=None", rule, "use an instruct model")


def test_a_vocabulary_larger_than_the_embedding(refused, tiny_models, tmp_path):
    model = copied(tiny_models("qwen3"), tmp_path)
    tensors = load_file(model / SINGLE)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:200].contiguous()
    save_file(tensors, model / SINGLE)
    rewrite_config(model, vocab_size=200)
    remedy = "use the tokenizer that belongs to the model in model.path"
    says(refused(model=model), "tokenizer of 307 tokens", "vocabulary larger than the embedding", remedy)


# --- the model folder


def test_an_architecture_that_there_is_not(refused, tiny_models, tmp_path):
    model = changed_config(tiny_models("qwen3"), tmp_path, architectures=["Qwen3NextForCausalLM"])
    remedy = "use one of Qwen3ForCausalLM, Qwen3MoeForCausalLM, Qwen2ForCausalLM, LlamaForCausalLM"
    says(refused(model=model), "architecture Qwen3NextForCausalLM", "is not supported", remedy)


def test_weights_that_are_quantised_in_a_way_that_is_not_read(refused, tiny_models, tmp_path):
    model = changed_config(tiny_models("qwen3"), tmp_path, quantization_config=dict(quant_method="gptq", bits=4))
    rule = "must be fp8: such weights would be read without their scales, or with wrong ones"
    says(refused(model=model), "quantization_config.quant_method=gptq", rule, "use the checkpoint in bfloat16")


def test_a_truncated_file_of_weights(refused, tiny_models, tmp_path):
    model = copied(tiny_models("qwen3"), tmp_path)
    whole = (model / SINGLE).read_bytes()
    (model / SINGLE).write_bytes(whole[: len(whole) // 2])
    says(refused(model=model), str(model / SINGLE), "is truncated or not safetensors", "download or copy the file again")


def test_a_truncated_shard(refused, tiny_models, tmp_path):
    model = sharded(tiny_models("qwen3"), tmp_path)
    shard = sorted(model.glob("model-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-64])
    says(refused(model=model), str(shard), "is truncated or not safetensors", "download or copy the file again")


def test_a_missing_shard(refused, tiny_models, tmp_path):
    model = sharded(tiny_models("qwen3"), tmp_path)
    shard = sorted(model.glob("model-*"))[1]
    shard.unlink()
    says(refused(model=model), str(shard), f"is missing, but {model / INDEX} lists it", "download or copy the folder again")


def test_a_missing_tensor(refused, tiny_models, tmp_path):
    model = copied(tiny_models("qwen3"), tmp_path)
    tensors = load_file(model / SINGLE)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, model / SINGLE)
    rule = "1 tensors are missing that config.json asks for: model.layers.2.mlp.up_proj.weight"
    says(refused(model=model), "checkpoint", rule, "name the checkpoint that belongs to this config.json")


def test_weights_of_another_shape(refused, tiny_models, tmp_path):
    model = changed_config(tiny_models("qwen3"), tmp_path, intermediate_size=96)
    rule = "has shape [128, 64], but config.json makes it [96, 64]"
    says(refused(model=model), "model.layers.0.mlp.gate_proj.weight", rule, "name the checkpoint that belongs")


def test_weights_that_are_a_pickle(refused, tiny_models, tmp_path):
    model = copied(tiny_models("qwen3"), tmp_path)
    (model / SINGLE).rename(model / "pytorch_model.bin")
    says(refused(model=model), str(model / "pytorch_model.bin"), "is a pickle, which can run code when it is read", "convert it")


# --- continuing


@pytest.fixture(scope="module")
def one_run(tiny_models, tiny_data, tmp_path_factory) -> Path:
    """A run of two steps, finished. Never write into it."""
    run = tmp_path_factory.mktemp("runs") / "one"
    run_ranks(1, _train, tiny_models("qwen3"), tiny_data, run)
    return run


@pytest.mark.parametrize(
    ("override", "value", "rule"),
    [
        ("optimizer.lr=1e-4", "optimizer.lr=0.0001", "differs from the 1e-06 that {run} was started with"),
        ("objective.name=sft", "objective.name=sft", "differs from the psft that {run} was started with"),
        ("objective.clip_high=0.4", "objective.clip_high=0.4", "differs from the 0.28 that {run} was started with"),
        ("train.batch_size=16", "train.batch_size=16", "differs from the 8 that {run} was started with"),
        ("train.seed=7", "train.seed=7", "differs from the 1234 that {run} was started with"),
    ],
)
def test_a_run_is_not_continued_as_another(override, value, rule, one_run, refused):
    error = refused(override, "train.steps=3", run=one_run)
    says(error, value, rule.format(run=one_run), "choose another run.dir, or give the old value to continue")


def test_what_a_continued_run_may_change(one_run, tiny_models, tiny_data):
    may = ("train.steps=3", f"{TP}=2", "checkpoint.interval=7", "data.packing=false", "train.max_skipped_updates=2")
    may += ("run.stop_after=60", "train.hang_factor=null", "train.hang_seconds=5")
    same = "objective.clip_high=0.28"  # the default, said aloud
    plan = plan_run(configured(tiny_models("qwen3"), tiny_data, one_run, *may, same), 2)
    assert plan.checkpoint == (one_run / "checkpoints/step-00000002").resolve()


def test_a_schedule_is_not_bent(one_run, refused, tmp_path):
    run = copied(one_run, tmp_path, "run")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("lr_decay_style: constant", "lr_decay_style: cosine"))
    error = refused("optimizer.lr_decay_style=cosine", "train.steps=3", run=run)
    says(error, "train.steps=3", "would bend the cosine schedule that was started with 2", "choose another run.dir")


def test_a_checkpoint_of_another_architecture(one_run, refused, tiny_models, tmp_path):
    value = "(architecture=Qwen3ForCausalLM)"
    rule = "is a checkpoint of another architecture: this model has architecture=Qwen3MoeForCausalLM"
    says(refused(run=one_run, model=tiny_models(MOE)), value, rule, "continue it with the model it was made from")
    run = copied(one_run, tmp_path, "run")  # the same, when the model that the run keeps has been replaced since
    shutil.copyfile(tiny_models(MOE) / "config.json", run / "model/config.json")
    with pytest.raises(Refused) as caught:
        export_run(run, tmp_path / "out")
    says(caught.value, value, rule, "continue it with the model it was made from")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_shape(one_run, refused, tiny_models, tmp_path):
    model = copied(tiny_models("qwen3"), tmp_path)
    tensors = {n: t for n, t in load_file(model / SINGLE).items() if not n.startswith(("model.layers.2.", "model.layers.3."))}
    save_file(tensors, model / SINGLE)
    rewrite_config(model, num_hidden_layers=2, layer_types=None)
    rule = "is a checkpoint of another architecture: this model has num_hidden_layers=2"
    says(refused(run=one_run, model=model), "(num_hidden_layers=4)", rule, "continue it with the model it was made from")


def test_a_latest_that_points_nowhere(one_run, refused, tmp_path):
    run = copied(one_run, tmp_path, "run")
    shutil.rmtree(run / "checkpoints/step-00000002")
    says(refused(run=run), "checkpoints/latest", "points at step-00000002, which is gone", "point it at a checkpoint")


def test_a_damaged_state(one_run, refused, tmp_path):
    run = copied(one_run, tmp_path, "run")
    (run / "checkpoints/step-00000002/state.json").write_text("{")
    says(refused(run=run), "state.json", "is damaged", "point `latest` at an older checkpoint")


def test_a_truncated_checkpoint(one_run, tmp_path):
    run = copied(one_run, tmp_path, "run")
    for file in (run / "checkpoints/step-00000002").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    done = megapsft("export", str(run), "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "has 100 bytes, but .metadata lists" in done.stderr
    assert "copy the checkpoint again" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


# --- exporting


def test_export_of_what_is_not_a_run(tmp_path):
    with pytest.raises(Refused) as caught:
        export_run(tmp_path, tmp_path / "out")
    says(caught.value, str(tmp_path), "is not the folder of a run (no config.yaml)", "name a run.dir")


def test_export_of_a_checkpoint_that_is_not_there(one_run, tmp_path):
    with pytest.raises(Refused) as caught:
        export_run(one_run, tmp_path / "out", "step-00000099")
    says(caught.value, "step-00000099", "is not there", "use one of latest, step-00000002")


def test_export_of_a_run_without_checkpoints(one_run, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(one_run / "config.yaml", tmp_path / "run")
    with pytest.raises(Refused) as caught:
        export_run(tmp_path / "run", tmp_path / "out")
    says(caught.value, "checkpoints/latest", "is not there", "train a step first")


def test_export_to_a_folder_that_holds_something(one_run, tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(Refused) as caught:
        export_run(one_run, tmp_path)
    says(caught.value, str(tmp_path), "exists and is not an empty folder", "name another folder, or delete this one")
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


# --- the command line


def test_a_refusal_is_one_line_and_exit_code_2(tiny_models, tiny_data, tmp_path):
    paths = [f"model.path={tiny_models('qwen3')}", f"data.path={tiny_data}", f"run.dir={tmp_path / 'run'}"]
    (tmp_path / "run.yaml").write_text("data: {columns: {prompt: question, demonstration: answer}}\n")
    for arguments, message in {
        ("no.yaml",): "megapsft: no.yaml: is not a file; name a config such as configs/psft/tiny-qwen3-gsm8k.yaml\n",
        ("run.yaml", *paths, f"{TP}=3"): "megapsft: tensor_model_parallel_size=3: must divide num_attention_heads=4; use 1, 2\n",
    }.items():
        done = megapsft("train", *arguments, cwd=tmp_path)
        assert (done.returncode, done.stderr, done.stdout) == (2, message, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"]


@pytest.mark.parametrize(
    ("text", "rule", "remedy"),
    [
        ("train: [", "is not YAML", "mend the file"),
        ("[1, 2]", "holds a list", "write a mapping"),
        ("base: run.yaml", "makes {path} a parent of itself", "name another file, or none"),
        ("base: 3", "is not a file name", "name one parent, relative to this file"),
        ("base: gone.yaml", "is not a file", "name a config such as"),
    ],
    ids=["not YAML", "not a mapping", "its own parent", "parent that is a number", "no such parent"],
)
def test_a_config_file(text, rule, remedy, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(Refused) as caught:
        load_config(path)
    says(caught.value, str(tmp_path), rule.format(path=path), remedy)


# --- values that are not finite


@pytest.fixture(scope="module")
def infinite(tiny_models, tmp_path_factory) -> Path:
    """A model with one infinite weight."""
    model = copied(tiny_models("qwen3"), tmp_path_factory.mktemp("infinite"))
    tensors = load_file(model / SINGLE)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.inf
    save_file(tensors, model / SINGLE, metadata={"format": "pt"})
    return model


def test_the_launcher_of_several_ranks_gives_their_exit_code(infinite, tiny_data, tmp_path):
    options = [*SMALL, f"model.path={infinite}", f"data.path={tiny_data}", f"run.dir={tmp_path / 'run'}", f"{TP}=2"]
    (tmp_path / "run.yaml").write_text("")
    done = megapsft("train", "run.yaml", *options, "train.max_skipped_updates=1", cwd=tmp_path)
    assert done.returncode == 3
    assert "1 updates in a row were skipped" in done.stderr


def test_training_stops_after_updates_that_are_all_skipped(infinite, tiny_data, tmp_path):
    run = tmp_path / "run"
    options = [*SMALL, f"model.path={infinite}", f"data.path={tiny_data}", f"run.dir={run}", "train.max_skipped_updates=3"]
    (tmp_path / "run.yaml").write_text("")
    done = megapsft("train", "run.yaml", *options, cwd=tmp_path)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("megapsft: ")]
    assert "3 updates in a row were skipped (train.max_skipped_updates=3)" in message
    assert "the gradient is not finite: rank 0: 1 of 1 microbatch losses, embedding.word_embeddings.weight and " in message
    assert "Lower optimizer.lr, check the data and model.path for values that are not finite" in message
    assert [record["train/skipped_updates"] for record in records(run)] == [1, 2, 3]
    assert all(record["train/loss"] is None for record in records(run))  # JSON has no NaN
    assert not (run / "checkpoints").exists()


def test_skipped_updates_leave_parameters_as_they_were(infinite, tiny_data, tmp_path):
    stopped = run_ranks(2, _train_until_stopped, infinite, tiny_data, tmp_path / "run")
    for message, exported in stopped:
        assert "rank 0: 1 of 1 microbatch losses, embedding.word_embeddings.weight and " in message
        assert "rank 1: 1 of 1 microbatch losses, embedding.word_embeddings.weight and " in message
        assert len(exported) == len(open_checkpoint(infinite).shapes)
    source = load_file(infinite / SINGLE)
    for name, values in stopped[0][1].items():
        assert values == source[name].numpy().tobytes(), name
    assert [record["train/skipped_updates"] for record in records(tmp_path / "run")] == [1, 2]
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_run_that_only_skips_ends_and_exports_what_it_began_with(infinite, tiny_data, tmp_path):
    run_ranks(1, _train, infinite, tiny_data, tmp_path / "run", "train.max_skipped_updates=100")
    assert [record["train/skipped_updates"] for record in records(tmp_path / "run")] == [1, 2, 3, 4]
    run_ranks(1, export_run, tmp_path / "run", tmp_path / "out")
    before, after = load_file(infinite / SINGLE), load_file(tmp_path / "out" / SINGLE)
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].numpy().tobytes() == after[name].numpy().tobytes(), name


# --- what runs on the ranks


def configured(model: Path, data: Path, run: Path, *overrides: str) -> Any:
    return load_config(None, [*SMALL, f"model.path={model}", f"data.path={data}", f"run.dir={run}", *overrides])


def _train(model: Path, data: Path, run: Path, *overrides: str) -> None:
    config = configured(model, data, run, *overrides)
    plan = plan_run(config, 1)
    initialize(plan.mesh, config.parallel, config.train.seed)
    train(start(plan))
    shutdown()


def _train_until_stopped(model: Path, data: Path, run: Path) -> tuple[str, dict[str, bytes | None]]:
    """What stopped the run, and the parameters after it."""
    config = configured(model, data, run, "train.max_skipped_updates=2", f"{TP}=2")
    plan = plan_run(config, 2)
    initialize(plan.mesh, config.parallel, config.train.seed)
    progress = start(plan)
    with pytest.raises(TrainingStopped) as stopped:
        train(progress)
    stream = export_stream(progress.policy.gpt_models(), plan.hf)
    exported = {name: None if tensor is None else tensor.numpy().tobytes() for name, tensor in stream}
    shutdown()
    return str(stopped.value), exported


# --- folders


def copied(folder: Path, to: Path, name: str = "model") -> Path:
    return Path(shutil.copytree(folder, to / name, symlinks=True))


def sharded(folder: Path, to: Path) -> Path:
    """The model in several files with an index."""
    checkpoint = open_checkpoint(folder)
    stream = ((name, checkpoint.read(name, slice(None))) for name in checkpoint.shapes)
    save_hf(stream, read_config(folder), folder, to / "model", max_shard_bytes=300_000)
    assert len(list((to / "model").glob("model-*"))) > 2
    return to / "model"


def changed_config(folder: Path, to: Path, **values: Any) -> Path:
    model = copied(folder, to)
    rewrite_config(model, **values)
    return model


def rewrite_config(model: Path, **values: Any) -> None:
    """config.json with other values; None leaves a key out."""
    config = json.loads((model / "config.json").read_text()) | values
    (model / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
