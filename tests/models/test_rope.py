"""Rotary frequencies against those of transformers, where Megatron's own would be wrong."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megapsft.models.hf_config import HFConfig
from megapsft.models.rope import inverse_frequencies

SCALED = dict(rope_type="llama3", rope_theta=5e5, low_freq_factor=1.0, high_freq_factor=4.0)
ROPES = [
    dict(rope_type="default", rope_theta=1e6),
    dict(rope_type="linear", rope_theta=1e4, factor=2.5),
    SCALED | dict(factor=8.0, original_max_position_embeddings=8192),
    SCALED | dict(factor=7.3, original_max_position_embeddings=1000),
    SCALED | dict(factor=32.0, original_max_position_embeddings=333, low_freq_factor=1.5, high_freq_factor=9.0),
]


@pytest.mark.parametrize("rope", ROPES, ids=str)
def test_inverse_frequencies(rope):
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, max_position_embeddings=4096, rope_parameters=rope)
    hf = HFConfig.parse(config.to_dict() | dict(architectures=["LlamaForCausalLM"]))
    ours, theirs = inverse_frequencies(hf), LlamaRotaryEmbedding(config).inv_freq
    assert ours.dtype == torch.float32
    assert ours.shape == (64,)
    torch.testing.assert_close(ours, theirs, rtol=2e-7, atol=0)
