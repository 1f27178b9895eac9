"""config.json in both spellings, and what is refused in it."""

import json

import pytest
import transformers

from megapsft.errors import Refused
from megapsft.models.hf_config import HFConfig, Rope, both_spellings

PLAIN = dict(
    architectures=["Qwen3ForCausalLM"], vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=128, rms_norm_eps=1e-6, max_position_embeddings=256, hidden_act="silu",
)  # fmt: skip
LLAMA3 = dict(factor=3.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
OLD = PLAIN | dict(
    rope_theta=5e5, rope_scaling=dict(rope_type="llama3", **LLAMA3), torch_dtype="bfloat16",
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
)  # fmt: skip
NEW = PLAIN | dict(
    rope_parameters=dict(rope_type="llama3", rope_theta=5e5, **LLAMA3), dtype="bfloat16",
    num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
)  # fmt: skip


def test_spellings_of_transformers_4_and_5_say_the_same():
    old, new = HFConfig.parse(OLD), HFConfig.parse(NEW)
    assert old == new
    assert old.rope == Rope(theta=5e5, type="llama3", **LLAMA3)
    assert (old.dtype, old.num_experts) == ("bfloat16", 4)


@pytest.mark.parametrize("raw", [OLD, NEW], ids=["transformers 4", "transformers 5"])
def test_both_spellings_holds_what_each_reader_looks_for(raw):
    both = both_spellings(raw)
    assert HFConfig.parse(both) == HFConfig.parse(raw)
    for spelling in (OLD, NEW):
        assert {key: both[key] for key in spelling} == spelling
    assert both_spellings(both) == both


def test_both_spellings_of_an_unscaled_rope():
    both = both_spellings(PLAIN | dict(rope_theta=1e6))
    assert (both["rope_scaling"], both["rope_parameters"]) == (None, dict(rope_type="default", rope_theta=1e6))


@pytest.mark.parametrize("raw", [OLD, NEW], ids=["transformers 4", "transformers 5"])
def test_transformers_reads_both_spellings_right(raw, tmp_path):
    raw = raw | dict(architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe")
    (tmp_path / "config.json").write_text(json.dumps(both_spellings(raw)))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (config.num_experts, str(config.dtype)) == (4, "torch.bfloat16")
    assert config.rope_parameters == dict(rope_type="llama3", rope_theta=5e5, **LLAMA3)


def test_defaults_that_files_leave_out():
    raw = {key: value for key, value in PLAIN.items() if key != "num_key_value_heads"}
    hf = HFConfig.parse(raw | dict(rope_theta=1e4, head_dim=None, rope_scaling=None))
    assert (hf.head_dim, hf.num_key_value_heads, hf.tie_word_embeddings, hf.attention_bias) == (16, 4, False, False)
    assert (hf.num_experts, hf.dtype, hf.rope) == (None, None, Rope(theta=1e4))


def test_linear_rope_under_its_oldest_spelling():
    hf = HFConfig.parse(PLAIN | dict(rope_theta=1e4, rope_scaling=dict(type="linear", factor=2.0)))
    assert hf.rope == Rope(theta=1e4, type="linear", factor=2.0)


BASE = PLAIN | dict(rope_theta=1e4)
FP8 = dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[128, 128])


def test_blocks_of_fp8_weights():
    assert HFConfig.parse(BASE).fp8_block is None
    assert HFConfig.parse(BASE | dict(quantization_config=None)).fp8_block is None
    assert HFConfig.parse(BASE | dict(quantization_config=FP8 | dict(modules_to_not_convert=["lm_head"]))).fp8_block == (128, 128)
    short = dict(quant_method="fp8", weight_block_size=[64, 256])  # what is left out is as above
    assert HFConfig.parse(BASE | dict(quantization_config=short)).fp8_block == (64, 256)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                                 "rms_norm_eps", "max_position_embeddings"])  # fmt: skip
def test_a_missing_key_is_named(key):
    raw = {name: value for name, value in BASE.items() if name != key}
    with pytest.raises(Refused, match=f"config.json: {key}: is missing"):
        HFConfig.parse(raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(architectures=[]), "architectures: is missing or empty"),
        (dict(attention_dropout=0.1), "attention_dropout=0.1: must be 0"),
        (dict(use_sliding_window=True), "use_sliding_window=True.*must be full attention"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types=.*must be full attention"),
        (dict(hidden_act="gelu"), "hidden_act=gelu: must be silu"),
        (dict(quantization_config=dict(quant_method="awq")), "quantization_config.quant_method=awq: must be fp8"),
        (dict(quantization_config=dict(bits=4)), "quantization_config.quant_method=None: must be fp8"),
        (dict(quantization_config=FP8 | dict(fmt="e5m2")), "quantization_config.fmt=e5m2: must be e4m3"),
        (dict(quantization_config=FP8 | dict(activation_scheme="static")), "activation_scheme=static: must be dynamic"),
        (dict(quantization_config=FP8 | dict(weight_block_size=None)), "weight_block_size=None: must be rows and columns"),
        (dict(quantization_config=FP8 | dict(weight_block_size=[128])), r"weight_block_size=\[128\]: must be rows and columns"),
        (dict(quantization_config=FP8 | dict(weight_block_size=[128, 0])), r"weight_block_size=\[128, 0\]: must be rows"),
        (dict(quantization_config=FP8 | dict(weight_block_size=[128, True])), r"weight_block_size=\[128, True\]: must be rows"),
        (dict(num_hidden_layers=0), "num_hidden_layers=0: is no size"),
        (dict(hidden_size=0), "hidden_size=0: is no size"),
        (dict(head_dim=-1), "head_dim=-1: is no size"),
        (dict(hidden_size=65), "hidden_size=65: is not divided by num_attention_heads=4"),
        (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "rope type 'yarn': is not known"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=4.0)), "low_freq_factor of rope type 'llama3': is missing"),
        (dict(rope_theta=None), "rope_theta: is missing, and so is rope_parameters.rope_theta"),
        (dict(rope_parameters=dict(rope_theta=1e6)), "rope_theta=10000.0, rope_parameters.rope_theta=1000000.0: contradict"),
        (dict(rope_scaling=dict(type="linear", factor=2.0), rope_parameters=dict(rope_type="linear", factor=4.0)), "contradict"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5: must be 1"),
        (dict(num_experts=4, num_local_experts=8), "num_experts=4, num_local_experts=8: contradict"),
        (dict(num_experts=4), "num_experts_per_tok: is missing"),
        (dict(dtype="float32", torch_dtype="bfloat16"), "dtype=float32, torch_dtype=bfloat16: contradict"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(change, message):
    with pytest.raises(Refused, match=message):
        HFConfig.parse(BASE | change)
