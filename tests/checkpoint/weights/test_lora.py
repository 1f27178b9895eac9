"""Adapters of PEFT merged into their base: against the definition in fp64, any rows as all rows; and what is refused.

PEFT itself is not needed here. Its merge_and_unload gave the same bits in fp32 for each kind of adapter below, when this was
written (peft 0.21.2); in bf16 it rounds B A before it adds it, and is farther from the definition.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megapsft.checkpoint.weights import rows_of
from megapsft.checkpoint.weights.hf import HFWeights
from megapsft.checkpoint.weights.lora import CONFIG, TENSORS, Adapter, Merged
from megapsft.errors import Refused

AT = "base_model.model."
Q, EXPERT = "model.layers.0.self_attn.q_proj", "model.layers.10.mlp.experts.3.gate_proj"
EMBEDDING, OUTPUT, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
SHAPES = {EMBEDDING: (301, 24), f"{Q}.weight": (300, 24), f"{EXPERT}.weight": (40, 24), NORM: (24,), OUTPUT: (301, 24)}


def random(shape, dtype=torch.float32, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def base(tmp_path: Path, dtype=torch.float32, without=()) -> HFWeights:
    folder = tmp_path / "base"
    folder.mkdir()
    content = {name: random(shape, dtype, seed) for seed, (name, shape) in enumerate(SHAPES.items()) if name not in without}
    save_file(content, folder / "model.safetensors")
    return HFWeights(folder)


def pair(module: str, rank: int = 4, dtype=torch.float32) -> dict[str, torch.Tensor]:
    rows, columns = SHAPES[f"{module}.weight"]
    a, b = random((rank, columns), dtype, 11), random((rows, rank), dtype, 12)
    return {f"{AT}{module}.lora_A.weight": a, f"{AT}{module}.lora_B.weight": b}


def embedding_pair(rank: int = 4) -> dict[str, torch.Tensor]:
    module = f"{AT}model.embed_tokens"
    return {f"{module}.lora_embedding_A": random((rank, 301), seed=13), f"{module}.lora_embedding_B": random((24, rank), seed=14)}


def adapter(tmp_path: Path, content: dict[str, torch.Tensor], **config) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in content.items()}, folder / TENSORS)
    (folder / CONFIG).write_text(json.dumps(dict(peft_type="LORA", r=4, lora_alpha=8, bias="none") | config))
    return folder


def product(content: dict[str, torch.Tensor], module: str, scaling: float) -> torch.Tensor:
    return content[f"{AT}{module}.lora_B.weight"].double() @ content[f"{AT}{module}.lora_A.weight"].double() * scaling


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_is_base_plus_scaled_product_rounded_once(dtype, adapter_dtype, tmp_path):
    weights = base(tmp_path, dtype)
    content = pair(Q, dtype=adapter_dtype) | pair(EXPERT, dtype=adapter_dtype)
    merged = Merged(weights, Adapter.open(adapter(tmp_path, content)))
    for module in (Q, EXPERT):
        exact = rows_of(weights, f"{module}.weight").double() + product(content, module, 8 / 4)
        found = rows_of(merged, f"{module}.weight")
        assert found.dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-5)
        else:  # nearest to the exact sum, but where fp32 lies at the border between two numbers
            assert (found != exact.to(dtype)).float().mean() < 1e-2
    assert merged.tensors == weights.tensors
    for name in (EMBEDDING, NORM, OUTPUT):
        assert torch.equal(rows_of(merged, name), rows_of(weights, name))


@pytest.mark.parametrize("name", [f"{Q}.weight", EMBEDDING])
def test_any_rows_are_those_of_the_whole(name, tmp_path):
    weights, content = base(tmp_path, torch.bfloat16), pair(Q) | embedding_pair()
    merged = Merged(weights, Adapter.open(adapter(tmp_path, content)))
    whole = rows_of(merged, name)
    for start, stop in ((0, 1), (0, 128), (100, 270), (127, 129), (255, 256), (299, 300)):
        assert torch.equal(rows_of(merged, name, start, stop), whole[start:stop])


def test_embeddings_have_their_factors_the_other_way_round(tmp_path):
    weights, content = base(tmp_path), embedding_pair()
    found = rows_of(Merged(weights, Adapter.open(adapter(tmp_path, content))), EMBEDDING)
    a, b = (content[f"{AT}model.embed_tokens.lora_embedding_{part}"].double() for part in "AB")
    torch.testing.assert_close(found.double(), rows_of(weights, EMBEDDING).double() + 2 * (b @ a).T, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "rank", "scaling"),
    [
        (dict(r=4, lora_alpha=8), 4, 2.0),
        (dict(r=4, lora_alpha=3), 4, 0.75),
        (dict(r=4, lora_alpha=8, use_rslora=True), 4, 8 / math.sqrt(4)),
        (dict(r=4, rank_pattern={"q_proj": 2}), 2, 4.0),
        (dict(r=4, rank_pattern={"layers.0.self_attn.q_proj": 2}, use_rslora=True), 2, 8 / math.sqrt(2)),
        (dict(r=4, rank_pattern={"k_proj": 2, r"^model\.layers\.0\..*": 8, "q_proj": 2}), 8, 1.0),  # the first that matches
        (dict(r=4, rank_pattern={"_proj": 2, "q_pro": 2, "s.0.self_attn.q_proj": 2}), 4, 2.0),  # whole parts of the name only
        (dict(r=4, alpha_pattern={"q_proj": 2}), 4, 0.5),
        (dict(r=4, alpha_pattern={r"layers\.1\..*": 2}), 4, 2.0),
        (dict(r=16, lora_alpha=1, rank_pattern={"q_proj": 4}, alpha_pattern={".*attn.*": 6}), 4, 1.5),
    ],
)
def test_rank_and_scaling_follow_the_rules_of_peft(config, rank, scaling, tmp_path):
    weights, content = base(tmp_path), pair(Q, rank)
    opened = Adapter.open(adapter(tmp_path, content, **config))
    assert opened.deltas[f"{Q}.weight"].scaling == pytest.approx(scaling, rel=1e-15)
    exact = rows_of(weights, f"{Q}.weight").double() + product(content, Q, scaling)
    torch.testing.assert_close(rows_of(Merged(weights, opened), f"{Q}.weight").double(), exact, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", ["lm_head.weight", "lm_head.base_layer.weight"])
def test_whole_tensors_of_an_adapter_replace_those_of_the_base(name, tmp_path):
    weights, new = base(tmp_path, torch.bfloat16), random((301, 24), seed=20)
    content = pair(Q) | {AT + name: new, f"{AT}{NORM}": random(24, seed=21)}
    opened = Adapter.open(adapter(tmp_path, content, modules_to_save=["norm"]))  # embeddings need not be named
    assert set(opened.replaced) == {OUTPUT, NORM}
    merged = Merged(weights, opened)
    assert torch.equal(rows_of(merged, OUTPUT), new.bfloat16())
    assert torch.equal(rows_of(merged, OUTPUT, 7, 200), new[7:200].bfloat16())
    assert torch.equal(rows_of(merged, NORM), random(24, seed=21).bfloat16())


def test_a_delta_is_added_to_the_base_that_is_stored_with_it(tmp_path):
    weights, below = base(tmp_path, torch.bfloat16), random((301, 24), seed=20)
    content = pair("lm_head") | {f"{AT}lm_head.base_layer.weight": below}
    found = rows_of(Merged(weights, Adapter.open(adapter(tmp_path, content))), OUTPUT)
    exact = (below.double() + product(content, "lm_head", 2.0)).bfloat16()
    assert (found != exact).float().mean() < 1e-2


def test_linear_ranks_of_what_can_be_kept(tmp_path):
    opened = Adapter.open(adapter(tmp_path, pair(Q, 2) | pair(EXPERT), rank_pattern={"q_proj": 2}))
    assert opened.linear_ranks() == {Q: 2, EXPERT: 4}
    assert rows_of(opened, f"{AT}{Q}.lora_B.weight").shape == (300, 2)


@pytest.mark.parametrize("content", [{f"{AT}{NORM}": random(24)}, embedding_pair()])
def test_what_can_only_be_merged(content, tmp_path):
    opened = Adapter.open(adapter(tmp_path, pair(Q) | content, modules_to_save=["norm"]))
    with pytest.raises(Refused, match="1 tensors are not LoRA of a linear layer, so cannot be kept beside the base"):
        opened.linear_ranks()


CONFIGS = [
    (dict(peft_type="IA3"), "adapter_config.json: peft_type=IA3: must be LORA"),
    (dict(r=0), "r=0: must be a positive number"),
    (dict(lora_alpha=None), "lora_alpha=None: must be a positive number"),
    (dict(lora_alpha=math.nan), "lora_alpha=nan: must be a positive number"),
    (dict(r="8"), "r=8: must be a positive number"),
    (dict(r=True), "r=True: must be a positive number"),
    (dict(rank_pattern=[1]), r"rank_pattern=\[1\]: must map patterns to positive numbers"),
    (dict(alpha_pattern={"q_proj": "2"}), "alpha_pattern=.*: must map patterns to positive numbers"),
    (dict(alpha_pattern={"q_proj": math.inf}), "alpha_pattern=.*: must map patterns to positive numbers"),
    (dict(rank_pattern={"(": 2}), r"rank_pattern=.*: has '\(', which is no regular expression"),
    (dict(bias="all"), "bias=all: must be none"),
    (dict(bias="lora_only"), "bias=lora_only: must be none"),
    *((dict(init_lora_weights=init), f"init_lora_weights={init}: changed the base weights")
      for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")),
    *((dict({key: value}), f"{key}=.*: is not plain LoRA") for key, value in (
        ("use_dora", True), ("fan_in_fan_out", True), ("lora_bias", True), ("trainable_token_indices", [1]),
        ("layer_replication", [[0, 1]]), ("target_parameters", ["mlp.experts.gate_up_proj"]), ("use_qalora", True),
        ("alora_invocation_tokens", [5]), ("use_bdlora", {"nblocks": 2}), ("kasa_config", {"beta": 1}), ("of_next_year", 1))),
]  # fmt: skip


@pytest.mark.parametrize(("config", "message"), CONFIGS)
def test_configs_that_would_be_merged_wrongly(config, message, tmp_path):
    with pytest.raises(Refused, match=message):
        Adapter.open(adapter(tmp_path, pair(Q), **config))


def test_what_peft_writes_for_a_plain_adapter_is_understood(tmp_path):
    plain = dict(
        alora_invocation_tokens=None, alpha_pattern={}, arrow_config=None, auto_mapping={"base_model_class": "Qwen3ForCausalLM"},
        base_model_name_or_path="base", corda_config=None, ensure_weight_tying=False, eva_config=None, exclude_modules=None,
        fan_in_fan_out=False, inference_mode=True, init_lora_weights=True, kasa_config=None, layer_replication=None,
        layers_pattern=None, layers_to_transform=None, loftq_config={}, lora_bias=False, lora_dropout=0.05, lora_ga_config=None,
        megatron_config=None, megatron_core="megatron.core", modules_to_save=None, monteclora_config=None, peft_version="0.21.2",
        qalora_group_size=16, rank_pattern={}, revision=None, target_modules=["q_proj"], target_parameters=None,
        task_type="CAUSAL_LM", trainable_token_indices=None, use_bdlora=None, use_dora=False, use_qalora=False, use_rslora=False,
        velora_config=None,
    )  # fmt: skip
    assert set(Adapter.open(adapter(tmp_path, pair(Q), **plain)).deltas) == {f"{Q}.weight"}


A, B = f"{AT}{Q}.lora_A.weight", f"{AT}{Q}.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop(B), "q_proj.lora_A.weight: has no other half"),
        (lambda c: c.pop(A), "q_proj.lora_B.weight: has no other half"),
        (lambda c: c.update({A: c[A][:3]}), r"has shapes \[3, 24\] and \[300, 4\], but adapter_config.json makes its rank 4"),
        (lambda c: c.update({A: c[A][:3], B: c[B][:, :3]}), "but adapter_config.json makes its rank 4"),
        (lambda c: c.update({A: c[A].flatten()}), "but adapter_config.json makes its rank 4"),
        (lambda c: c[A].__setitem__((1, 2), torch.nan), "lora_A.weight: holds numbers that are infinite or none"),
        (lambda c: c[B].__setitem__((299, 3), torch.inf), "lora_B.weight: holds numbers that are infinite or none"),
        (lambda c: c.update({A: c[A].double()}), "lora_A.weight: is stored as torch.float64"),
        (lambda c: c.update({A.removeprefix("base_model."): c.pop(A)}), "does not begin with base_model.model."),
        (lambda c: c.update({f"{AT}{Q}.lora_magnitude_vector": torch.ones(300)}),
         "1 tensors are nothing that can be merged: .*lora_magnitude_vector"),
        (lambda c: c.update({f"{AT}{Q}.lora_B.bias": torch.ones(300)}),
         "1 tensors are nothing that can be merged: .*lora_B.bias"),
        (lambda c: c.update({f"{AT}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 24)}),
         "1 tensors are nothing that can be merged: .*trainable_tokens_delta"),
        (lambda c: c.update({f"{AT}{NORM}": torch.ones(24)}),
         "1 tensors are nothing that can be merged: .*norm.weight"),  # not in modules_to_save
        (lambda c: c.update({f"{AT}lm_head.weight": torch.ones(2), f"{AT}lm_head.base_layer.weight": torch.ones(2)}),
         "1 tensors are nothing that can be merged: .*lm_head"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_understood(change, message, tmp_path):
    content = pair(Q)
    change(content)
    with pytest.raises(Refused, match=message):
        Adapter.open(adapter(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pair(Q), r"is for 1 tensors that the model does not have: model.layers.0.self_attn.q_proj.weight"),
        ({f"{AT}model.extra.weight": torch.ones(2)}, "is for 1 tensors that the model does not have: model.extra.weight"),
        ({f"{AT}{NORM}": torch.ones(23)}, r"is for a tensor model.norm.weight of shape \[23\], but the model's is \[24\]"),
        ({AT + EMBEDDING: torch.ones(302, 24)},
         r"model.embed_tokens.weight of shape \[302, 24\], but the model's is \[301, 24\]"),
        ({f"{AT}lm_head.lora_A.weight": torch.ones(4, 24), f"{AT}lm_head.lora_B.weight": torch.ones(300, 4)},
         r"lm_head.weight of shape \[300, 24\], but the model's is \[301, 24\]"),
        (pair("lm_head") | {f"{AT}lm_head.base_layer.weight": torch.ones(302, 24)},
         r"lm_head.weight of shape \[302, 24\], but the model's is \[301, 24\]"),
    ],
)  # fmt: skip
def test_an_adapter_of_another_model(content, message, tmp_path):
    weights = base(tmp_path, without=[f"{Q}.weight"])
    with pytest.raises(Refused, match=message):
        Merged(weights, Adapter.open(adapter(tmp_path, content, modules_to_save=["model.extra", "norm"])))


TRAINED = [
    dict(target_modules=["q_proj", "gate_proj"]),
    dict(target_modules=["model.layers.0.self_attn.q_proj"]),
    dict(target_modules=r".*\.(q_proj|gate_proj)"),
    dict(target_modules=["_proj"]),  # no whole part of a name
    dict(target_modules="all-linear"),
    dict(target_modules=["lm_head", "q_proj"], exclude_modules=["lm_head"]),
    dict(target_modules=["lm_head", "q_proj"], exclude_modules="lm_.*"),
    dict(target_modules=["q_proj", "gate_proj"], layers_to_transform=[0, 10]),
    dict(target_modules=["q_proj", "gate_proj"], layers_to_transform=0, layers_pattern="layers"),
    dict(target_modules=["o_proj"]),  # which this model does not have
]
LACKING = [
    (dict(target_modules=["q_proj", "lm_head"]), "lm_head"),
    (dict(target_modules=r"model\.embed.*|.*q_proj"), "model.embed_tokens"),
    (dict(target_modules=["embed_tokens", "lm_head"], exclude_modules=["lm_head"]), "model.embed_tokens"),
    (dict(modules_to_save=["norm"]), "model.norm"),
    (dict(modules_to_save=["lm_head"]), "lm_head"),
]


@pytest.mark.parametrize("config", TRAINED)
def test_all_that_was_trained_is_there(config, tmp_path):
    Merged(base(tmp_path), Adapter.open(adapter(tmp_path, pair(Q), **config)))  # experts: none at all is none that were trained


@pytest.mark.parametrize(("config", "module"), LACKING)
def test_something_that_was_trained_is_lacking(config, module, tmp_path):
    with pytest.raises(Refused, match=f"lacks 1 modules that adapter_config.json says were trained: {module};"):
        Merged(base(tmp_path), Adapter.open(adapter(tmp_path, pair(Q), **config)))


@pytest.mark.parametrize(("layers", "lacks"), [(None, True), ([1], True), (1, True), ([0], False), (0, False)])
def test_layers_that_were_trained(layers, lacks, tmp_path):
    content = {f"model.layers.{layer}.self_attn.q_proj.weight": torch.ones(300, 24) for layer in range(2)}
    folder = tmp_path / "layers"
    folder.mkdir()
    save_file(content, folder / "model.safetensors")
    opened = Adapter.open(adapter(tmp_path, pair(Q), target_modules=["q_proj"], layers_to_transform=layers))
    if not lacks:
        Merged(HFWeights(folder), opened)
        return
    with pytest.raises(Refused, match="lacks 1 modules .*: model.layers.1.self_attn.q_proj;"):
        Merged(HFWeights(folder), opened)


def test_one_expert_of_several_is_lacking(tmp_path):
    experts = [EXPERT, EXPERT.replace("experts.3", "experts.4")]
    folder = tmp_path / "experts"
    folder.mkdir()
    save_file({f"{name}.weight": torch.ones(SHAPES[f"{EXPERT}.weight"]) for name in experts}, folder / "model.safetensors")
    opened = Adapter.open(adapter(tmp_path, pair(EXPERT), target_modules=["gate_proj"]))
    with pytest.raises(Refused, match="lacks 1 modules .*: model.layers.10.mlp.experts.4.gate_proj;"):
        Merged(HFWeights(folder), opened)


@pytest.mark.parametrize("content", [pair("lm_head"), embedding_pair(), {AT + EMBEDDING: torch.ones(301, 24)}])
def test_tied_embeddings_would_no_longer_be(content, tmp_path):
    weights, opened = base(tmp_path), Adapter.open(adapter(tmp_path, pair(Q) | content))
    with pytest.raises(Refused, match="changes (lm_head|model.embed_tokens).weight, but config.json ties them"):
        Merged(weights, opened, tied=True)
    Merged(weights, opened)


def test_a_base_in_fp8_is_refused(tmp_path):
    weights = base(tmp_path, torch.float8_e4m3fn)
    with pytest.raises(Refused, match="q_proj.weight of torch.float8_e4m3fn: cannot have an adapter merged"):
        Merged(weights, Adapter.open(adapter(tmp_path, pair(Q))))


class TestFiles:
    def test_pickle(self, tmp_path):
        folder = adapter(tmp_path, pair(Q))
        (folder / TENSORS).rename(folder / "adapter_model.bin")
        with pytest.raises(Refused, match="adapter_model.bin: is a pickle, which can run code when it is read"):
            Adapter.open(folder)

    @pytest.mark.parametrize("file", [CONFIG, TENSORS])
    def test_missing(self, file, tmp_path):
        folder = adapter(tmp_path, pair(Q))
        (folder / file).unlink()
        with pytest.raises(Refused, match=f"{file}: is missing; name the folder of an adapter"):
            Adapter.open(folder)

    def test_truncated(self, tmp_path):
        folder = adapter(tmp_path, pair(Q))
        (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-8])
        with pytest.raises(Refused, match=f"{TENSORS}: is truncated or not safetensors"):
            Adapter.open(folder)

    def test_every_tensor_is_as_it_was_saved(self, tmp_path):
        folder = adapter(tmp_path, pair(Q) | embedding_pair())
        opened = Adapter.open(folder)
        stored = load_file(folder / TENSORS)
        assert {name: rows_of(opened, name).tolist() for name in opened.tensors} == {n: t.tolist() for n, t in stored.items()}
        opened.close()
