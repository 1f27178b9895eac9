"""Each family's rules account for every tensor of a transformers model; what a family refuses."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megapsft.errors import Refused
from megapsft.models.families import FAMILIES, family_of, parameter_count
from megapsft.models.hf_config import HFConfig

SIZES = dict(vocab_size=31, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
MODELS = {
    "Qwen3": dict(head_dim=10),
    "Qwen3Moe": dict(head_dim=10, **EXPERTS),
    "Qwen2": {},
    "Llama": dict(head_dim=10),
}


def config(prefix: str, **options) -> HFConfig:
    hf = getattr(transformers, f"{prefix}Config")(**SIZES, **MODELS[prefix], **options)
    return HFConfig.parse(hf.to_dict() | dict(architectures=[f"{prefix}ForCausalLM"]))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("prefix", MODELS)
def test_rules_are_the_state_dict(prefix, tied, tmp_path):
    torch.manual_seed(0)
    options = getattr(transformers, f"{prefix}Config")(**SIZES, **MODELS[prefix], tie_word_embeddings=tied)
    model = getattr(transformers, f"{prefix}ForCausalLM")(options)
    model.save_pretrained(tmp_path)  # the state dict in memory joins the experts; files do not
    stored = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    hf = config(prefix, tie_word_embeddings=tied)
    rules = family_of(hf).parameters(hf)
    used = [(name, shape) for rule in rules for name, shape in rule.sources.items()]
    assert dict(used) == stored
    assert len(used) == len(stored)
    assert len({rule.name for rule in rules}) == len(rules)
    assert parameter_count(hf) == model.num_parameters()


def test_experts_and_nothing_else_are_split_by_the_expert_group():
    hf = config("Qwen3Moe")
    for rule in family_of(hf).parameters(hf):
        assert rule.expert == (".experts." in rule.name)


def test_transformer_config_of_a_dense_model():
    hf = config("Qwen2", tie_word_embeddings=True)
    assert family_of(hf).transformer_config(hf) == dict(
        num_layers=3, hidden_size=32, num_attention_heads=4, num_query_groups=2, kv_channels=8, ffn_hidden_size=48,
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, normalization="RMSNorm", layernorm_epsilon=1e-6,
        qk_layernorm=False, add_bias_linear=False, add_qkv_bias=True, hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("normalised", [False, True])
def test_transformer_config_of_experts(normalised):
    hf = config("Qwen3Moe", norm_topk_prob=normalised)
    options = family_of(hf).transformer_config(hf)
    assert options["qk_layernorm"]
    assert (options["num_moe_experts"], options["moe_router_topk"], options["moe_ffn_hidden_size"]) == (4, 2, 24)
    assert options["moe_router_pre_softmax"] == (not normalised)


def test_an_unknown_architecture_lists_the_known():
    hf = HFConfig.parse(config("Qwen3").raw | dict(architectures=["Qwen3ForSequenceClassification"]))
    with pytest.raises(Refused, match="Qwen3ForSequenceClassification: is not supported; use one of " + ", ".join(FAMILIES)):
        family_of(hf)


@pytest.mark.parametrize(
    ("prefix", "change", "message"),
    [
        ("Qwen3", dict(attention_bias=True), "attention_bias=True of Qwen3ForCausalLM: must be false"),
        ("Qwen3Moe", dict(attention_bias=True), "attention_bias=True of Qwen3MoeForCausalLM: must be false"),
        ("Llama", dict(attention_bias=True), "attention_bias=True of LlamaForCausalLM: must be false"),
        ("Llama", dict(mlp_bias=True), "mlp_bias=True of LlamaForCausalLM: must be false"),
        ("Qwen3Moe", dict(decoder_sparse_step=2), "decoder_sparse_step=2 of .* must be 1"),
        ("Qwen3Moe", dict(mlp_only_layers=[0]), r"mlp_only_layers=\[0\] of .* must be empty"),
        ("Qwen3Moe", dict(num_experts=None, num_local_experts=None), "num_experts=None of .* must be 1 or more"),
        ("Qwen3Moe", dict(num_experts_per_tok=1, norm_topk_prob=True), "norm_topk_prob=True of .* without a gradient"),
    ],
)
def test_refused(prefix, change, message):
    hf = HFConfig.parse(config(prefix).raw | change)
    with pytest.raises(Refused, match=message):
        family_of(hf).transformer_config(hf)
    with pytest.raises(Refused, match=message):
        family_of(hf).parameters(hf)
