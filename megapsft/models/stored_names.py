"""How a torch_dist checkpoint spells parameters: one tensor for all layers, and one for all experts of all layers.

    decoder.layers.5.mlp.experts.local_experts.8.linear_fc1.weight         as names.py has it
    decoder.layers.mlp.experts.experts.linear_fc1.weight [layers, experts, ...] at (5, 8)     in the checkpoint

Transformer Engine fuses norms into the linear layers that follow them, and files them there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megapsft.models.hf_config import HFConfig
from megapsft.models.names import EXPERT, LAYER

LINEAR = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
NORMS = ("input_layernorm", "self_attention.q_layernorm", "self_attention.k_layernorm", "pre_mlp_layernorm")
FUSED = {"input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
         "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a checkpoint keeps a parameter: `key`, at `index` of its leading axes, which have the sizes `leading`."""

    key: str
    index: tuple[int, ...] = ()
    leading: tuple[int, ...] = ()


def stored_at(name: str, hf: HFConfig) -> Place:
    """Where Megatron with Transformer Engine (and we, with either kind of layers) keep the parameter `name`."""
    return next(spellings(name, hf))


def spellings(name: str, hf: HFConfig) -> Iterator[Place]:
    """All places that some Megatron keeps the parameter at, the usual one first.

    The local layers of Megatron-LM file the norm of sparse layers as if it were fused, or none as if it were; newer versions
    can have keys for each layer and each expert.
    """
    found = LAYER.match(name)
    if found is None:
        yield Place(name)
        return
    layer, rest = int(found[1]), name[found.end() :]
    expert = EXPERT.search("." + rest)
    layers = (hf.num_hidden_layers,)
    if expert is not None:
        number, rest = int(expert[1]), EXPERT.sub(".experts.", "." + rest)[1:]
        each = rest.replace(".experts.experts.", f".experts.experts.{number}.")
        yield Place(f"decoder.layers.{rest}", (layer, number), (*layers, hf.num_experts or 0))
        yield Place(f"decoder.layers.{each}", (layer,), layers)
        yield Place(f"decoder.layers.{layer}.{rest}", (number,), (hf.num_experts or 0,))
        yield Place(f"decoder.layers.{layer}.{each}")
        return
    names = [rest]
    if rest in FUSED:
        apart = bool(hf.num_experts) and rest == "pre_mlp_layernorm.weight"  # nothing follows it that it could be fused into
        names = [rest, FUSED[rest]] if apart else [FUSED[rest], rest]
    for spelt in names:
        yield Place(f"decoder.layers.{spelt}", (layer,), layers)
        yield Place(f"decoder.layers.{layer}.{spelt}")


def extra_states(hf: HFConfig) -> Iterator[str]:
    """Keys of the empty `_extra_state` objects that Megatron asks a checkpoint for, with local or Transformer Engine layers."""
    layers = hf.num_hidden_layers
    linear = [name for name in LINEAR if not (hf.num_experts and name.startswith("mlp."))]
    for layer in range(layers):
        for name in (*linear, *NORMS):
            yield f"decoder.layers.{name}._extra_state/shard_{layer}_{layers}"
        for expert in range(hf.num_experts or 0):
            for name in ("linear_fc1", "linear_fc2"):
                at = f"shard_{layer}.{expert}_{layers}.{hf.num_experts}"
                yield f"decoder.layers.mlp.experts.experts.{name}._extra_state/{at}"
    yield "decoder.final_layernorm._extra_state/shard_0_1"


def is_weight(key: str) -> bool:
    """Whether a key of a checkpoint is one of a model's parameters, rather than of an optimizer, a generator or a critic."""
    return key.startswith(("embedding.", "decoder.", "output_layer.")) and not re.search(r"\._extra_state(/|$)", key)
