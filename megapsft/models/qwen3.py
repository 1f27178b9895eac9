"""Qwen3, dense: RMSNorm on each head's query and key, no biases."""

from megapsft.models.family import Family, refuse
from megapsft.models.hf_config import HFConfig


class Qwen3(Family):
    architecture = "Qwen3ForCausalLM"
    qk_layernorm = True

    def check(self, hf: HFConfig) -> None:
        if hf.attention_bias:
            refuse(hf, "attention_bias", "must be false: these projections have no biases here")
