"""What a small random model is like. Without torch: the command line says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RandomModel:
    """Its sizes and its seed. The experts' numbers only count for qwen3_moe."""

    vocab_size: int = 512  # tokens of the tokenizer, the special ones among them
    hidden_size: int = 96  # of a token's state
    num_layers: int = 4  # of the decoder
    num_attention_heads: int = 4  # of queries
    num_key_value_heads: int = 2  # of keys and values, which queries share in groups
    head_dim: int = 24  # of a head; even, since rotary positions turn pairs
    intermediate_size: int = 256  # of a dense layer's MLP
    num_experts: int = 8  # of each layer, where the family has experts
    num_experts_per_tok: int = 2  # that a token goes to
    moe_intermediate_size: int = 64  # of each expert
    max_position_embeddings: int = 4096  # tokens that prompt and response may have
    tie_word_embeddings: bool = False  # whether the output layer is the embedding
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights
    seed: int = 1234  # of the random weights


__all__ = ["RandomModel"]
