"""Llama 2 to 3.3, dense: no biases, from 3.1 on with rescaled rotary frequencies."""

from megapsft.models.family import Family, refuse
from megapsft.models.hf_config import HFConfig


class Llama(Family):
    architecture = "LlamaForCausalLM"

    def check(self, hf: HFConfig) -> None:
        for key in ("attention_bias", "mlp_bias"):
            if hf.raw.get(key):
                refuse(hf, key, "must be false: these projections have no biases here")
