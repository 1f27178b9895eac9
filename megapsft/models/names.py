"""One name for one parameter, whatever wrappers, pipeline stages and kinds of layer spec it lies under."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
HF_EMBEDDING, HF_OUTPUT = "model.embed_tokens.weight", "lm_head.weight"  # Hugging Face's

# Transformer Engine fuses the norms into the linear layers that follow them, and keeps all experts of a rank in one module
TRANSFORMER_ENGINE = (
    (re.compile(r"\.self_attention\.linear_qkv\.layer_norm_(weight|bias)$"), r".input_layernorm.\1"),
    (re.compile(r"\.mlp\.linear_fc1\.layer_norm_(weight|bias)$"), r".pre_mlp_layernorm.\1"),
    (re.compile(r"\.mlp\.experts\.(linear_fc[12]\.(?:adapter\.\S+\.)?)weight(\d+)$"), r".mlp.experts.local_experts.\2.\1weight"),
)
LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


def canonical_name(local_name: str, layer_offset: int, expert_offset: int) -> str:
    """The name of a parameter in the whole model, spelt as by Megatron's local layer spec.

    Args:
        local_name: as `named_parameters` of a (wrapped) model chunk gives it.
        layer_offset: how many layers come before the first one of this chunk.
        expert_offset: how many experts come before the first one of this rank.

    Example:
        >>> canonical_name("module.module.decoder.layers.1.mlp.experts.linear_fc1.weight0", 4, 8)
        'decoder.layers.5.mlp.experts.local_experts.8.linear_fc1.weight'
    """
    name = re.sub(r"^(module\.)+", "", local_name)
    for pattern, spelling in TRANSFORMER_ENGINE:
        name = pattern.sub(spelling, name)
    name = LAYER.sub(lambda found: f"decoder.layers.{int(found[1]) + layer_offset}.", name)
    return EXPERT.sub(lambda found: f".local_experts.{int(found[1]) + expert_offset}.", name)


@dataclass(frozen=True)
class Spelling:
    """How the files of a model begin the names of its tensors: (there, here) where that is otherwise than here."""

    prefixes: tuple[tuple[str, str], ...] = ()

    def here(self, name: str) -> str:
        return _begin(name, self.prefixes)

    def there(self, name: str) -> str:
        return _begin(name, tuple((here, there) for there, here in self.prefixes))

    def fits(self, names: Iterable[str]) -> bool:
        """Whether all of these names, of files, are spelt so."""
        return all(self.there(self.here(name)) == name for name in names)


def _begin(name: str, prefixes: tuple[tuple[str, str], ...]) -> str:
    """The name with the first of the prefixes that it has replaced by the other one of its pair."""
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
