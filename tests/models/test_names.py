"""Canonical names of parameters."""

import pytest

from megapsft.models.names import canonical_name


@pytest.mark.parametrize(
    ("local", "canonical"),
    [
        ("module.module.embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("output_layer.weight", "output_layer.weight"),
        ("decoder.final_layernorm.weight", "decoder.final_layernorm.weight"),
        ("decoder.layers.0.input_layernorm.weight", "decoder.layers.6.input_layernorm.weight"),
        ("module.decoder.layers.3.self_attention.linear_qkv.bias", "decoder.layers.9.self_attention.linear_qkv.bias"),
        ("decoder.layers.1.self_attention.linear_qkv.layer_norm_weight", "decoder.layers.7.input_layernorm.weight"),
        ("decoder.layers.1.mlp.linear_fc1.layer_norm_weight", "decoder.layers.7.pre_mlp_layernorm.weight"),
        ("decoder.layers.1.mlp.linear_fc1.weight", "decoder.layers.7.mlp.linear_fc1.weight"),
        ("decoder.layers.0.mlp.experts.local_experts.2.linear_fc2.weight",
         "decoder.layers.6.mlp.experts.local_experts.10.linear_fc2.weight"),
        ("decoder.layers.0.self_attention.linear_qkv.adapter.adapter_q.linear_in.weight",
         "decoder.layers.6.self_attention.linear_qkv.adapter.adapter_q.linear_in.weight"),
        ("decoder.layers.0.mlp.experts.linear_fc2.adapter.linear_out.weight3",
         "decoder.layers.6.mlp.experts.local_experts.11.linear_fc2.adapter.linear_out.weight"),
        ("decoder.layers.0.mlp.experts.linear_fc1.weight11", "decoder.layers.6.mlp.experts.local_experts.19.linear_fc1.weight"),
    ],
)  # fmt: skip
def test_canonical_name(local, canonical):
    assert canonical_name(local, layer_offset=6, expert_offset=8) == canonical
