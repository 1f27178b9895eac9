"""megapsft init-model: a small random model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def init_model(
    *,
    family: str,
    data: Path,
    out: Path,
    vocab_size: int = 512,
    hidden_size: int = 96,
    num_layers: int = 4,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    head_dim: int = 24,
    intermediate_size: int = 256,
    num_experts: int = 8,
    num_experts_per_tok: int = 2,
    moe_intermediate_size: int = 64,
    max_position_embeddings: int = 4096,
    tie_word_embeddings: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
    seed: int = 1234,
) -> int:
    """Make a small random Hugging Face checkpoint, with a tokenizer trained on your data.

    For example:
        megapsft init-model --family qwen3_moe --data train.jsonl --out models/tiny
        megapsft init-model --family llama --data train.parquet --vocab-size 2048 --hidden-size 256 --out models/larger

    Args:
        family: qwen3, qwen3_moe, qwen2, llama or qwen2_5_vl, which has a tiny vision tower too.
        data: .jsonl or .parquet; the tokenizer is trained on all its texts, whatever the columns.
        out: the folder to make; it must not hold anything yet.
        vocab_size: tokens of the tokenizer, the special ones among them.
        hidden_size: of a token's state.
        num_layers: of the decoder.
        num_attention_heads: of queries.
        num_key_value_heads: of keys and values, which queries share in groups.
        head_dim: of a head; even, since rotary positions turn pairs.
        intermediate_size: of a dense layer's MLP.
        num_experts: of each layer, where the family has experts.
        num_experts_per_tok: that a token goes to.
        moe_intermediate_size: of each expert.
        max_position_embeddings: tokens that prompt and response may have.
        tie_word_embeddings: whether the output layer is the embedding.
        dtype: of the weights.
        seed: of the random weights.
    """
    options = dict(locals())
    from megapsft.checkpoint.random_init import init_model as make

    made = make(data_path=options.pop("data"), out_dir=options.pop("out"), **options)
    print(f"made {made}")
    return 0
