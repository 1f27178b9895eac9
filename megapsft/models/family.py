"""A model family, and what the families of dense and sparse Llama-like models share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch.nn.functional as F

from megapsft.errors import Refused
from megapsft.models.hf_config import HFConfig
from megapsft.models.names import EMBEDDING, HF_EMBEDDING, HF_OUTPUT, OUTPUT, Spelling
from megapsft.models.parameters import QKV, GatedMLP, Replicated, RowParallel, Rule, Vocab, expand

LAYER = "decoder.layers.{layer}"
HF_LAYER = "model.layers.{layer}"


class Family(ABC):
    """How models of one architecture look in Megatron. Stateless; one file a family."""

    architecture: ClassVar[str]  # exactly architectures[0] of config.json
    qk_layernorm: ClassVar[bool] = False  # RMSNorm of each head's query and key
    qkv_bias: ClassVar[bool] = False
    mrope: ClassVar[bool] = False  # positions have a time, a height and a width, which are one number in text
    carried: ClassVar[str | None] = None  # beginning of the names of tensors that no rule has, and that are kept as they are
    spelling: ClassVar[Spelling] = Spelling()  # that files may have instead of the one here
    served: ClassVar[bool] = True  # whether SGLang's servers are given its weights

    @abstractmethod
    def check(self, hf: HFConfig) -> None:
        """Raises Refused for variants of the family that we would compute wrongly."""

    def transformer_config(self, hf: HFConfig) -> dict[str, Any]:
        """Keyword arguments of Megatron's TransformerConfig that describe the architecture, and nothing else.

        Raises:
            Refused: a variant of the family that is not supported.
        """
        self.check(hf)
        return dict(
            num_layers=hf.num_hidden_layers,
            hidden_size=hf.hidden_size,
            num_attention_heads=hf.num_attention_heads,
            num_query_groups=hf.num_key_value_heads,
            kv_channels=hf.head_dim,
            ffn_hidden_size=hf.intermediate_size,
            gated_linear_unit=True,
            activation_func=F.silu,
            normalization="RMSNorm",
            layernorm_epsilon=hf.rms_norm_eps,
            qk_layernorm=self.qk_layernorm,
            add_bias_linear=False,
            add_qkv_bias=self.qkv_bias,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        )

    def parameters(self, hf: HFConfig) -> tuple[Rule, ...]:
        """One rule for every parameter, in the order of export. Tied embeddings have no rule for the output layer.

        Raises:
            Refused: a variant of the family that is not supported.
        """
        self.check(hf)
        vocab = (hf.vocab_size, hf.hidden_size)
        rules = [
            Vocab(name=EMBEDDING, hf=HF_EMBEDDING, shape=vocab),
            *self.attention(hf),
            *self.mlp(hf),
            Replicated(name="decoder.final_layernorm.weight", hf="model.norm.weight", shape=(hf.hidden_size,)),
        ]
        if not hf.tie_word_embeddings:
            rules.append(Vocab(name=OUTPUT, hf=HF_OUTPUT, shape=vocab))
        return expand(rules, hf.num_hidden_layers, hf.num_experts)

    def attention(self, hf: HFConfig) -> list[Rule]:
        """Rules of a layer up to its MLP."""
        at, hf_at = f"{LAYER}.self_attention", f"{HF_LAYER}.self_attn"
        hidden, rows = hf.hidden_size, hf.num_attention_heads * hf.head_dim
        qkv = dict(groups=hf.num_key_value_heads, head_dim=hf.head_dim)
        rules: list[Rule] = [
            Replicated(name=f"{LAYER}.input_layernorm.weight", hf=f"{HF_LAYER}.input_layernorm.weight", shape=(hidden,)),
            QKV(name=f"{at}.linear_qkv.weight", hf=f"{hf_at}.{{part}}_proj.weight", shape=(rows, hidden), **qkv),
        ]
        if self.qkv_bias:
            rules.append(QKV(name=f"{at}.linear_qkv.bias", hf=f"{hf_at}.{{part}}_proj.bias", shape=(rows,), **qkv))
        if self.qk_layernorm:
            rules += [
                Replicated(name=f"{at}.{part}_layernorm.weight", hf=f"{hf_at}.{part}_norm.weight", shape=(hf.head_dim,))
                for part in "qk"
            ]
        rules.append(RowParallel(name=f"{at}.linear_proj.weight", hf=f"{hf_at}.o_proj.weight", shape=(hidden, rows)))
        return rules

    def mlp(self, hf: HFConfig) -> list[Rule]:
        """Rules of a layer from its second norm on: here one gated MLP."""
        return [post_attention_norm(hf), *gated_mlp(f"{LAYER}.mlp", f"{HF_LAYER}.mlp", hf.hidden_size, hf.intermediate_size)]


class SparseFamily(Family):
    """A family whose layers all have a router and experts, without shared ones."""

    def transformer_config(self, hf: HFConfig) -> dict[str, Any]:
        return super().transformer_config(hf) | dict(
            num_moe_experts=hf.num_experts,
            moe_router_topk=hf.num_experts_per_tok,
            moe_ffn_hidden_size=hf.moe_intermediate_size,
            moe_router_pre_softmax=not hf.norm_topk_prob,  # normalising the top k is the softmax over them alone
            moe_router_dtype="fp32",
            moe_router_load_balancing_type="none",
        )

    def mlp(self, hf: HFConfig) -> list[Rule]:
        at, hf_at = f"{LAYER}.mlp", f"{HF_LAYER}.mlp"
        expert, hf_expert = f"{at}.experts.local_experts.{{expert}}", f"{hf_at}.experts.{{expert}}"
        return [
            post_attention_norm(hf),
            Replicated(name=f"{at}.router.weight", hf=f"{hf_at}.gate.weight", shape=(hf.num_experts, hf.hidden_size)),
            *gated_mlp(expert, hf_expert, hf.hidden_size, hf.moe_intermediate_size, expert=True),
        ]


def post_attention_norm(hf: HFConfig) -> Rule:
    name, hf_name = f"{LAYER}.pre_mlp_layernorm.weight", f"{HF_LAYER}.post_attention_layernorm.weight"
    return Replicated(name=name, hf=hf_name, shape=(hf.hidden_size,))


def gated_mlp(at: str, hf_at: str, hidden: int, intermediate: int, expert: bool = False) -> list[Rule]:
    gate, down = (intermediate, hidden), (hidden, intermediate)
    return [
        GatedMLP(name=f"{at}.linear_fc1.weight", hf=f"{hf_at}.{{part}}_proj.weight", shape=gate, expert=expert),
        RowParallel(name=f"{at}.linear_fc2.weight", hf=f"{hf_at}.down_proj.weight", shape=down, expert=expert),
    ]


def refuse(hf: HFConfig, key: str, rule: str) -> None:
    """Refuses the model because of what its config.json says for `key`."""
    value = f"config.json: {key}={hf.raw.get(key)} of {hf.architecture}"
    raise Refused(value, rule, "use a model of this family without it")
