"""Qwen2 and Qwen2.5, dense: biases on query, key and value."""

from megapsft.models.family import Family
from megapsft.models.hf_config import HFConfig


class Qwen2(Family):
    architecture = "Qwen2ForCausalLM"
    qkv_bias = True

    def check(self, hf: HFConfig) -> None:
        """Nothing beyond what HFConfig refuses."""
