"""Qwen3 with experts in every layer."""

from megapsft.models.family import SparseFamily, refuse
from megapsft.models.hf_config import HFConfig


class Qwen3Moe(SparseFamily):
    architecture = "Qwen3MoeForCausalLM"
    qk_layernorm = True

    def check(self, hf: HFConfig) -> None:
        if hf.attention_bias:
            refuse(hf, "attention_bias", "must be false: these projections have no biases here")
        if not hf.num_experts:
            refuse(hf, "num_experts", "must be 1 or more")
        if hf.raw.get("decoder_sparse_step", 1) != 1:
            refuse(hf, "decoder_sparse_step", "must be 1: every layer here has experts")
        if hf.raw.get("mlp_only_layers"):
            refuse(hf, "mlp_only_layers", "must be empty: every layer here has experts")
        if hf.norm_topk_prob and hf.num_experts_per_tok == 1:
            refuse(hf, "norm_topk_prob", "with num_experts_per_tok=1 leaves routers without a gradient")
