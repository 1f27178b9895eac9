"""A small model to start from where there is none to download: random weights and a tokenizer trained on the data at hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from megapsft.checkpoint.hf_folder import SINGLE, read_config
from megapsft.checkpoint.hf_save import READABLE, write_config
from megapsft.checkpoint.random_model import RandomModel
from megapsft.checkpoint.unfinished import check_free
from megapsft.data.rows import read_texts
from megapsft.errors import Refused
from megapsft.models.families import family_of
from megapsft.output.places import check_folder

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
IMAGES = {  # key of config.json -> token that stands for an image, a video, or an end of one
    "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
}  # fmt: skip
FAMILIES = ("qwen3", "qwen3_moe", "qwen2", "llama", "qwen2_5_vl")
WHOLE_HEADS = ("qwen2", "qwen2_5_vl")  # whose config.json cannot say that heads have another size than their share


def init_model(
    family: Literal["qwen3", "qwen3_moe", "qwen2", "llama", "qwen2_5_vl"],
    data_path: str | Path,
    out_dir: str | Path,
    **options: Any,
) -> Path:
    """Write a Hugging Face model folder, with a tokenizer and its ChatML template, and give its path.

    The tokenizer is a byte-level BPE, digits one by one, trained on every text of `data_path`. The model's
    vocabulary is exactly the tokenizer's: at most `vocab_size` tokens, fewer where the texts do not give as many, not padded.
    The vision tower of qwen2_5_vl is the smallest of its kind, whatever the sizes. The same arguments give the same folder.

    Args:
        data_path: .jsonl or .parquet; all strings count, whatever their columns.
        options: of RandomModel.

    Raises:
        Refused: unknown family, sizes that do not divide or are none, a vocabulary without room for all bytes, `out_dir` that is
            not empty or cannot be made, or data that cannot be read.
    """
    out, like = Path(out_dir), RandomModel(**options)
    if family not in FAMILIES:
        raise Refused(f"family={family!r}", "is not known", "use one of " + ", ".join(FAMILIES))
    for size in dataclasses.fields(like):
        value = getattr(like, size.name)
        if size.name != "seed" and type(value) is int and value < 1:
            raise Refused(f"{size.name}={value}", "is no size", f"use 1 or more, such as {size.name}={size.default}")
    if family == "llama":
        _divides("num_attention_heads", like.num_attention_heads, "hidden_size", like.hidden_size)
    _divides("num_key_value_heads", like.num_key_value_heads, "num_attention_heads", like.num_attention_heads)
    if like.head_dim % 2:
        rule = "must be even: rotary positions turn pairs"
        raise Refused(f"head_dim={like.head_dim}", rule, f"use head_dim={like.head_dim + 1}")
    if family in WHOLE_HEADS and like.num_attention_heads * like.head_dim != like.hidden_size:
        rule = f"must be num_attention_heads={like.num_attention_heads} x head_dim={like.head_dim} for {family}"
        raise Refused(f"hidden_size={like.hidden_size}", rule, f"use hidden_size={like.num_attention_heads * like.head_dim}")
    if family == "qwen3_moe" and not 1 <= like.num_experts_per_tok <= like.num_experts:
        rule = f"must be between 1 and num_experts={like.num_experts}"
        raise Refused(f"num_experts_per_tok={like.num_experts_per_tok}", rule, "use fewer, or more experts")
    check_free(out)
    check_folder(f"--out {out}", out)

    images = IMAGES if family == "qwen2_5_vl" else {}
    tokenizer = train_tokenizer(read_texts(data_path), like.vocab_size, tuple(images.values()))
    tokenizer.model_max_length = like.max_position_embeddings
    sizes: dict[str, Any] = dict(
        vocab_size=len(tokenizer),
        hidden_size=like.hidden_size,
        num_hidden_layers=like.num_layers,
        num_attention_heads=like.num_attention_heads,
        num_key_value_heads=like.num_key_value_heads,
        head_dim=like.head_dim,
        intermediate_size=like.intermediate_size,
        tie_word_embeddings=like.tie_word_embeddings,
        max_position_embeddings=like.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6,
        initializer_range=0.02,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if family == "qwen3_moe":
        sizes |= dict(
            num_experts=like.num_experts,
            num_experts_per_tok=like.num_experts_per_tok,
            moe_intermediate_size=like.moe_intermediate_size,
            norm_topk_prob=like.num_experts_per_tok > 1,
        )
    if family == "qwen2_5_vl":
        sizes = _with_vision(sizes, {key: tokenizer.convert_tokens_to_ids(token) for key, token in images.items()})
    model = _random_model(family, sizes, like.seed).to(getattr(torch, like.dtype))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out)
    (out / SINGLE).chmod(READABLE)
    tokenizer.save_pretrained(out)
    hf = read_config(out)
    family_of(hf).check(hf)
    write_config(hf, getattr(torch, like.dtype), out)
    return out


def train_tokenizer(texts: Iterator[str], vocab_size: int, more: tuple[str, ...] = ()) -> Any:
    """A `transformers` tokenizer with at most `vocab_size` tokens, special ones and `more` included, and a ChatML template.

    Raises:
        Refused: fewer tokens than bytes and special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, START, END, *more]
    if vocab_size < 256 + len(special):
        rule = f"must be {256 + len(special)} or more: every byte is a token, and so are {', '.join(special)}"
        raise Refused(f"vocab_size={vocab_size}", rule, "use 512")
    bpe = Tokenizer(models.BPE())
    # numbers of any length in ten tokens: arithmetic over merged digits is much harder to learn
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(split)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START, *more],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def _random_model(family: str, sizes: dict[str, Any], seed: int) -> Any:
    import transformers

    transformers.logging.disable_progress_bar()  # for one small file

    prefix, kind = {
        "qwen3": ("Qwen3", "ForCausalLM"),
        "qwen3_moe": ("Qwen3Moe", "ForCausalLM"),
        "qwen2": ("Qwen2", "ForCausalLM"),
        "llama": ("Llama", "ForCausalLM"),
        "qwen2_5_vl": ("Qwen2_5_VL", "ForConditionalGeneration"),
    }[family]
    config = getattr(transformers, f"{prefix}Config")(**sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, f"{prefix}{kind}")(config)


def _with_vision(sizes: dict[str, Any], tokens: dict[str, int]) -> dict[str, Any]:
    """The options of a model that sees images, from those of its language model."""
    pairs = sizes["head_dim"] // 2
    side = pairs * 3 // 8  # as in the released models: 16, 24 and 24 of 64
    rope = {**sizes["rope_parameters"], "mrope_section": [pairs - 2 * side, side, side]}
    text = {key: value for key, value in sizes.items() if key not in ("head_dim", "tie_word_embeddings")}
    return dict(
        text_config={**text, "rope_parameters": rope},
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=48,
            num_heads=2,
            out_hidden_size=sizes["hidden_size"],
            fullatt_block_indexes=[1],
        ),
        tie_word_embeddings=sizes["tie_word_embeddings"],
        **tokens,
    )


def _divides(name: str, size: int, of: str, number: int) -> None:
    if size < 1 or number % size:
        fits = ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
        raise Refused(f"{name}={size}", f"must divide {of}={number}", f"use one of {fits}")
