"""What a Hugging Face config.json says, read by ourselves because transformers 4 and 5 spell it differently.

transformers 4 reads a config.json of 5 without an error, but with rope_theta 10000 and the default number of experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megapsft.errors import Refused

ROPE_TYPES = ("default", "linear", "llama3")
MROPE = "mrope"  # what transformers 4 calls the default one where it has a mrope_section
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings",
)  # fmt: skip
TEXT = "text_config"  # where transformers 5 describes the language model of one that sees images; 4 did in the file itself
OF_TEXT = (  # what may be said in both places, and must be the same then
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "rms_norm_eps", "max_position_embeddings", "rope_theta", "hidden_act", "attention_dropout",
    "use_sliding_window",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding; `factor` and what follows it only count where `type` uses them."""

    theta: float
    type: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    mrope_section: tuple[int, ...] | None = None  # pairs of dimensions that turn with a position's time, height and width


@dataclass(frozen=True, kw_only=True)
class HFConfig:
    """A decoder-only model as its config.json describes it. Names are those of transformers."""

    architecture: str  # architectures[0]
    vocab_size: int  # true: without the padding that tensor parallelism adds
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: Rope
    max_position_embeddings: int
    attention_bias: bool = False
    dtype: str | None = None  # of the stored weights, such as "bfloat16"; None: not said
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool = False
    fp8_block: tuple[int, int] | None = None  # rows and columns that share a scale, where the stored weights are FP8
    raw: dict[str, Any] = field(repr=False, compare=False)  # the whole file

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> HFConfig:
        """The config in a config.json that was read into `raw`.

        Raises:
            Refused: a key that is missing, a size below 1, two spellings that contradict each other, or something that we would
                compute wrongly: unknown rope type, attention dropout, sliding windows, another activation, weights that are
                quantised otherwise than to FP8 in blocks.
        """
        whole, raw = raw, _text(raw)
        architectures = raw.get("architectures")
        if not architectures:
            raise Refused("config.json: architectures", "is missing or empty", 'add it, such as ["Qwen3ForCausalLM"]')
        _check_supported(raw)
        for key in SIZES:
            if raw.get(key) is not None and raw[key] < 1:
                raise Refused(f"config.json: {key}={raw[key]}", "is no size", "mend the file: it is 1 or more")
        heads, hidden_size = _need(raw, "num_attention_heads"), _need(raw, "hidden_size")
        if raw.get("head_dim") is None and hidden_size % heads:
            rule = f"is not divided by num_attention_heads={heads}, and there is no head_dim"
            raise Refused(f"config.json: hidden_size={hidden_size}", rule, "add head_dim, or mend the sizes")
        num_experts = _same(raw, "num_experts", "num_local_experts")
        return cls(
            architecture=architectures[0],
            vocab_size=_need(raw, "vocab_size"),
            hidden_size=hidden_size,
            num_hidden_layers=_need(raw, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or hidden_size // heads,
            intermediate_size=_need(raw, "intermediate_size"),
            rms_norm_eps=_need(raw, "rms_norm_eps"),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
            rope=_rope(raw),
            max_position_embeddings=_need(raw, "max_position_embeddings"),
            attention_bias=bool(raw.get("attention_bias")),
            dtype=_same(raw, "dtype", "torch_dtype"),
            num_experts=num_experts,
            num_experts_per_tok=_need(raw, "num_experts_per_tok") if num_experts else None,
            moe_intermediate_size=_need(raw, "moe_intermediate_size") if num_experts else None,
            norm_topk_prob=bool(raw.get("norm_topk_prob")),
            fp8_block=_fp8_block(raw.get("quantization_config")),
            raw=dict(whole),
        )


def both_spellings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` with what only one of transformers 4 and 5 would understand written for the other too."""
    both = dict(raw)
    text = _text(raw)
    scaling = {key: value for key, value in _scaling(text).items() if key not in ("type", "rope_theta")}
    kind = _rope_type(_scaling(text))
    theta = _theta(text)
    scaled = kind != "default" or "mrope_section" in scaling
    rope = {
        "rope_theta": theta,
        "rope_scaling": {**scaling, "rope_type": kind} if scaled else None,
        "rope_parameters": {**scaling, "rope_type": kind, "rope_theta": theta},
    }
    if raw.get(TEXT):
        both[TEXT] = {**raw[TEXT], **rope}
    else:
        both |= rope
    for new, old in (("dtype", "torch_dtype"), ("num_local_experts", "num_experts")):
        value = _same(raw, new, old)
        if value is not None:
            both[new] = both[old] = value
    return both


def _text(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config.json says of the language model: all of it, or what it has in `text_config` with what is said of both."""
    text = raw.get(TEXT)
    if not text:
        return raw
    if not isinstance(text, Mapping):
        raise Refused(f"config.json: {TEXT}={text!r}", "must be an object", "download config.json again")
    for key in OF_TEXT:
        _same({key: raw.get(key), f"{TEXT}.{key}": text.get(key)}, key, f"{TEXT}.{key}")
    of_both = {
        "architectures": raw.get("architectures"),
        "quantization_config": raw.get("quantization_config"),
        # transformers 5 looks at the file itself, and where that says no, at what transformers 4 wrote inside
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings")) or bool(text.get("tie_word_embeddings")),
    }
    dtype = _same(raw, "dtype", "torch_dtype")
    if dtype is not None:
        of_both |= {"dtype": dtype, "torch_dtype": dtype}
    return {**text, **of_both}


def _check_supported(raw: Mapping[str, Any]) -> None:
    if raw.get("attention_dropout"):
        value = f"config.json: attention_dropout={raw['attention_dropout']}"
        raise Refused(value, "must be 0: attention here has no dropout", "set attention_dropout to 0")
    if raw.get("use_sliding_window") or set(raw.get("layer_types") or ()) - {"full_attention"}:
        value = f"config.json: use_sliding_window={raw.get('use_sliding_window')}, layer_types={raw.get('layer_types')}"
        raise Refused(value, "must be full attention in every layer", "use a model without sliding windows")
    if raw.get("hidden_act", "silu") != "silu":
        raise Refused(f"config.json: hidden_act={raw['hidden_act']}", "must be silu", "use a model with SwiGLU layers")


def _fp8_block(quantization: Mapping[str, Any] | None) -> tuple[int, int] | None:
    """What FP8 weights share a scale; None where weights are not quantised."""
    if not quantization:
        return None
    if not isinstance(quantization, Mapping):
        value = f"config.json: quantization_config={quantization!r}"
        raise Refused(value, "must be an object", "download config.json again, or use the checkpoint in bfloat16")
    understood = {"quant_method": ("fp8",), "fmt": ("e4m3", None), "activation_scheme": ("dynamic", None)}
    for key, values in understood.items():
        if quantization.get(key) not in values:
            rule = f"must be {values[0]}: such weights would be read without their scales, or with wrong ones"
            value = f"config.json: quantization_config.{key}={quantization.get(key)}"
            raise Refused(value, rule, "use the checkpoint in bfloat16")
    block = quantization.get("weight_block_size")
    if not isinstance(block, list | tuple) or len(block) != 2 or any(type(size) is not int or size < 1 for size in block):
        value = f"config.json: quantization_config.weight_block_size={block}"
        raise Refused(value, "must be rows and columns of a block, such as [128, 128]", "use the checkpoint in bfloat16")
    return block[0], block[1]


def _need(raw: Mapping[str, Any], key: str) -> Any:
    if raw.get(key) is None:
        raise Refused(f"config.json: {key}", "is missing", "complete the file; a default might not be what the model has")
    return raw[key]


def _same(raw: Mapping[str, Any], *spellings: str) -> Any:
    """The value that one spelling has, or all of them; None where there is none."""
    found = {key: raw[key] for key in spellings if raw.get(key) is not None}
    values = list(found.values())
    if any(value != values[0] for value in values):
        shown = ", ".join(f"{key}={value}" for key, value in found.items())
        raise Refused(f"config.json: {shown}", "contradict each other", "delete the wrong one")
    return values[0] if values else None


def _rope(raw: Mapping[str, Any]) -> Rope:
    scaling = _scaling(raw)
    kind = _rope_type(scaling)
    theta = _theta(raw)
    if kind not in ROPE_TYPES:
        raise Refused(f"config.json: rope type {kind!r}", "is not known", "use a model with one of " + ", ".join(ROPE_TYPES))
    partial = scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        rule = "must be 1: every dimension of a head is rotated here"
        raise Refused(f"config.json: partial_rotary_factor={partial}", rule, "use a model that rotates whole heads")
    section = scaling.get("mrope_section")
    if MROPE in (scaling.get("type"), scaling.get("rope_type")) and section is None:
        raise Refused("config.json: mrope_section of rope type 'mrope'", "is missing", "download config.json again")
    if section is not None and (not isinstance(section, list) or any(type(pairs) is not int for pairs in section)):
        raise Refused(f"config.json: mrope_section={section!r}", "must be a list of numbers", "download config.json again")
    section = None if section is None else tuple(section)
    if kind == "default":
        return Rope(theta=theta, mrope_section=section)
    keys = ("factor",) if kind == "linear" else LLAMA3
    missing = [key for key in keys if scaling.get(key) is None]
    if missing:
        value = f"config.json: {missing[0]} of rope type {kind!r}"
        raise Refused(value, "is missing", "add it to rope_scaling or rope_parameters")
    return Rope(theta=theta, type=kind, mrope_section=section, **{key: scaling[key] for key in keys})


def _theta(raw: Mapping[str, Any]) -> float:
    parameters = raw.get("rope_parameters") or {}
    spelt = {"rope_theta": raw.get("rope_theta"), "rope_parameters.rope_theta": parameters.get("rope_theta")}
    theta = _same(spelt, *spelt)
    if theta is None:
        remedy = "add it; old Llama configs leave out what was then the default, 10000"
        raise Refused("config.json: rope_theta", "is missing, and so is rope_parameters.rope_theta", remedy)
    return theta


def _scaling(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What either spelling says of the scaling, {} where neither does."""
    spelt = [raw[key] for key in ("rope_parameters", "rope_scaling") if raw.get(key)]
    if len(spelt) == 2 and _plain(spelt[0]) != _plain(spelt[1]):
        value = f"config.json: rope_parameters={spelt[0]}, rope_scaling={spelt[1]}"
        raise Refused(value, "contradict each other", "delete the wrong one")
    return dict(spelt[0]) if spelt else {}


def _plain(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """A scaling without what may be said elsewhere, for comparison."""
    rest = {key: value for key, value in scaling.items() if key not in ("type", "rope_type", "rope_theta")}
    return {"rope_type": _rope_type(scaling), **rest}


def _rope_type(scaling: Mapping[str, Any]) -> str:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    return "default" if kind == MROPE else kind
