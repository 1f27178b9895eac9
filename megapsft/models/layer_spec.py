"""Which modules a transformer layer is made of: Transformer Engine's or Megatron's local ones, as `transformer_impl` says.

Both spell their checkpoints alike: a run may be trained on one kind of machine and continued on the other.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megapsft.models.attention import SDPAttention
from megapsft.models.router import Router
from megapsft.platform.compat import save_experts_without_states


class Norm:
    """torch's RMSNorm or LayerNorm whose weights' gradients are summed over the tensor group under sequence parallelism.

    Megatron's own wrapper refuses sequence parallelism.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **newer: Any) -> torch.nn.Module:
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


def layer_spec(config: TransformerConfig, vp_stage: int | None = None) -> ModuleSpec | TransformerBlockSubmodules:
    """The layers that this rank's (virtual) pipeline stage builds."""
    if config.transformer_impl == "transformer_engine":
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
        if config.num_moe_experts is not None:
            _use_our_router(spec)
            save_experts_without_states()
        return spec
    layers = [_local_layer(config)] * get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=Norm)


def _local_layer(config: TransformerConfig) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = Norm
    attention = layer.self_attention.submodules
    attention.core_attention = SDPAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = Norm
    if config.num_moe_experts is not None:
        _use_our_router(spec)
        # Transformer Engine's spec stores this norm apart for MoE; the local one would file it under linear_fc1
        layer.sharded_state_dict_keys_map = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    return spec


def _use_our_router(layer: ModuleSpec) -> None:
    mlp = layer.submodules.mlp
    experts = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules  # a partial in newer Megatron
    experts.router = Router
