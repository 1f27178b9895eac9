"""How large what is measured is: on a GPU as in the models that people train, on a CPU just large enough to run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

UPDATES_A_STEP = 4  # of PSFT: the old policy's pass is over all but the first
RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")  # of FP8; the last needs Blackwell
DENSE: dict[str, Any] = {  # Qwen3-8B but for the number of layers
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12_288,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
}
MOE: dict[str, Any] = DENSE | {  # Qwen3-30B-A3B but for the number of layers
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 6144,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
SMALL = {
    "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 128,
}  # fmt: skip


@dataclass(frozen=True)
class Packing:
    """Packs without padding, of samples that are all alike; the peer gets the same samples as rows, and pads nothing either."""

    name: str
    positions: int  # of a pack
    sample: int  # tokens of a sample


@dataclass(frozen=True)
class Sizes:
    dense: dict[str, Any]
    moe: dict[str, Any]
    packings: tuple[Packing, ...]
    tokens: int  # of an update
    updates: int  # of SFT that are timed
    products: tuple[tuple[int, int, int], ...]  # m, k, n, beside those of the head
    copied: int  # bytes of a copy
    heads: tuple[tuple[int, int], ...]  # hidden, tokens
    vocabulary: int
    slabs: tuple[int, int]  # bytes of fp32 logits: a large budget, and the default of model.logprob_chunk_bytes
    repeats: int

    def of(self, name: str) -> dict[str, Any]:
        """config.json of the slice `dense` or `moe`."""
        return {"dense": self.dense, "moe": self.moe}[name]


REAL = Sizes(
    dense=DENSE,
    moe=MOE,
    packings=(Packing("4k", 4096, 1024), Packing("32k", 32_768, 4096)),
    tokens=32_768,
    updates=3,
    products=((8192, 8192, 8192),),
    copied=2**32,
    heads=tuple((hidden, tokens) for hidden in (2048, 4096) for tokens in (8192, 16_384, 32_768)),
    vocabulary=151_936,
    slabs=(2**30, 2**26),
    repeats=3,
)
TINY = replace(
    REAL,
    dense=DENSE | SMALL,
    moe=MOE | SMALL | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    packings=(Packing("4k", 64, 16), Packing("32k", 128, 32)),
    tokens=128,
    updates=2,
    products=((128, 128, 128),),
    copied=2**16,
    heads=((32, 48), (32, 96), (64, 96)),
    vocabulary=512,
    slabs=(2**15, 2**14),
    repeats=2,
)
