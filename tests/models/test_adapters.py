"""Where an adapter lies in Megatron: names, splits that fit those of the base, and places in a checkpoint."""

import pytest
import torch

from megapsft.errors import Refused
from megapsft.models.adapters import PREFIX, ColumnParallel, adapter_places, adapter_rules, is_adapter, stored_ranks
from megapsft.models.families import family_of
from megapsft.models.hf_config import HFConfig
from megapsft.models.parameters import QKV, GatedMLP, RowParallel
from megapsft.models.stored_names import Place

DENSE = dict(
    architectures=["Qwen3ForCausalLM"], vocab_size=31, hidden_size=32, num_hidden_layers=3, num_attention_heads=8,
    num_key_value_heads=4, head_dim=4, intermediate_size=48, rms_norm_eps=1e-6, max_position_embeddings=64, rope_theta=1e4,
)  # fmt: skip
SPARSE = DENSE | dict(architectures=["Qwen3MoeForCausalLM"], num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
QWEN2 = DENSE | dict(architectures=["Qwen2ForCausalLM"])  # with biases, which have no adapters
ATTENTION = [f"self_attn.{part}_proj" for part in "qkvo"]
MLP = [f"{part}_proj" for part in ("gate", "up", "down")]


def modules(hf: HFConfig, layers=None) -> list[str]:
    mlp = [f"mlp.experts.{expert}.{part}" for expert in range(hf.num_experts) for part in MLP] if hf.num_experts else \
        [f"mlp.{part}" for part in MLP]  # fmt: skip
    layers = range(hf.num_hidden_layers) if layers is None else layers
    return [f"model.layers.{layer}.{name}" for layer in layers for name in (*ATTENTION, *mlp)]


def names(rules) -> dict[str, str]:
    """Megatron's name by what is between the prefix and the end of PEFT's."""
    return {rule.hf.removeprefix(PREFIX): rule.name for rule in rules}


def test_names_are_those_of_canonical_lora():
    dense = names(adapter_rules(HFConfig.parse(DENSE), dict.fromkeys(modules(HFConfig.parse(DENSE)), 4)))
    at = "decoder.layers.2."
    for hf, megatron in {
        "self_attn.q_proj": "self_attention.linear_qkv.adapter.adapter_q",
        "self_attn.k_proj": "self_attention.linear_qkv.adapter.adapter_k",
        "self_attn.v_proj": "self_attention.linear_qkv.adapter.adapter_v",
        "self_attn.o_proj": "self_attention.linear_proj.adapter",
        "mlp.gate_proj": "mlp.linear_fc1.adapter.adapter_gate",
        "mlp.up_proj": "mlp.linear_fc1.adapter.adapter_up",
        "mlp.down_proj": "mlp.linear_fc2.adapter",
    }.items():
        assert dense[f"model.layers.2.{hf}.lora_A.weight"] == f"{at}{megatron}.linear_in.weight"
        assert dense[f"model.layers.2.{hf}.lora_B.weight"] == f"{at}{megatron}.linear_out.weight"
    assert len(dense) == 3 * 7 * 2
    sparse = names(adapter_rules(HFConfig.parse(SPARSE), dict.fromkeys(modules(HFConfig.parse(SPARSE)), 4)))
    hf, at = "model.layers.2.mlp.experts.3.", f"{at}mlp.experts.local_experts.3."
    assert sparse[f"{hf}up_proj.lora_A.weight"] == f"{at}linear_fc1.adapter.adapter_up.linear_in.weight"
    assert sparse[f"{hf}down_proj.lora_B.weight"] == f"{at}linear_fc2.adapter.linear_out.weight"
    assert len(sparse) == 3 * (4 + 4 * 3) * 2


@pytest.mark.parametrize("raw", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_only_what_has_an_adapter_has_rules_in_the_order_of_the_base(raw):
    hf = HFConfig.parse(raw)
    picked = dict.fromkeys(reversed(modules(hf)[1::3]), 2)
    rules = adapter_rules(hf, picked)
    assert [rule.hf for rule in rules] == [f"{PREFIX}{name}.lora_{part}.weight" for name in modules(hf)[1::3] for part in "AB"]
    assert all(rule.expert == (".experts." in rule.hf) for rule in rules)
    assert adapter_rules(hf, {}) == ()


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("raw", [DENSE, SPARSE, QWEN2], ids=["Qwen3", "Qwen3Moe", "Qwen2"])
def test_what_a_rank_has_of_an_adapter_is_for_what_it_has_of_the_base(raw, tp):
    """The shard of the merged weights is the shard of the base plus the product of shards, as Megatron multiplies them."""
    hf = HFConfig.parse(raw)
    ranks = {name: 4 + 4 * (number % 2) for number, name in enumerate(modules(hf))}
    rules = {rule.hf.removeprefix(PREFIX): rule for rule in adapter_rules(hf, ranks)}
    torch.manual_seed(0)
    content = {name: torch.randn(rule.shape, dtype=torch.float64) for name, rule in rules.items()}

    def shards(name):
        rule = rules[name]
        rows, columns = rule.shape
        shape = (rows, columns // tp) if rule.axis == 1 else (rows // tp, columns)
        found = [rule.load(lambda _, index: content[name][index], rank, tp, shape) for rank in range(tp)]
        assert torch.equal(torch.cat(found, dim=rule.axis), content[name])
        return found

    checked = 0
    for base in family_of(hf).parameters(hf):
        if not isinstance(base, QKV | GatedMLP | RowParallel) or len(base.shape) != 2:
            continue
        delta = {}
        for name in base.sources:
            module = name.removesuffix(".weight")
            delta[name] = content[f"{module}.lora_B.weight"] @ content[f"{module}.lora_A.weight"]
        rows, columns = base.whole
        shape = (rows, columns // tp) if base.axis == 1 else (rows // tp, columns)
        for rank in range(tp):
            parts = {}
            for name in base.sources:
                module = name.removesuffix(".weight")
                down, up = shards(f"{module}.lora_A.weight"), shards(f"{module}.lora_B.weight")
                if base.axis == 1:
                    parts[name] = torch.cat(up) @ down[rank]
                else:
                    parts[name] = up[rank] @ torch.cat(down)
            expected = base.load(lambda name, index, delta=delta: delta[name][index], rank, tp, shape)
            if isinstance(base, QKV):  # q, k, v of each group that the rank has
                groups = base.groups // tp
                split = [part.view(groups, -1, part.shape[1]) for part in parts.values()]
                found = torch.cat(split, dim=1).flatten(0, 1)
            else:
                found = torch.cat(list(parts.values()))
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            checked += 1
    assert checked == tp * (3 * (2 + (4 * 2 if hf.num_experts else 2)))


NO_PROJECTIONS = ["model.layers.0.mlp.gate", "model.embed_tokens", "lm_head", "model.layers.3.self_attn.q_proj"]


@pytest.mark.parametrize("module", NO_PROJECTIONS)
def test_adapters_of_what_is_no_projection(module):
    hf = HFConfig.parse(SPARSE)
    with pytest.raises(Refused, match=f"has adapters for {module}, which are not projections of Qwen3MoeForCausalLM; merge"):
        adapter_rules(hf, {modules(hf)[0]: 4, module: 4})


class TestPlaces:
    def test_one_tensor_for_all_layers_and_experts(self):
        hf = HFConfig.parse(SPARSE)
        places = adapter_places(adapter_rules(hf, dict.fromkeys(modules(hf), 4)), hf)
        qkv = "self_attention.linear_qkv.adapter.adapter_q.linear_in.weight"
        fc1 = "linear_fc1.adapter.adapter_up.linear_in.weight"
        assert places[f"decoder.layers.2.{qkv}"] == Place(f"decoder.layers.{qkv}", (2,), (3,))
        expert = places[f"decoder.layers.1.mlp.experts.local_experts.3.{fc1}"]
        assert expert == Place(f"decoder.layers.mlp.experts.experts.{fc1}", (1, 3), (3, 4))

    @pytest.mark.parametrize(
        "ranks",
        [
            lambda hf: dict.fromkeys(modules(hf, layers=[0, 2]), 4),  # a layer without
            lambda hf: {name: 8 if ".1." in name else 4 for name in modules(hf)},  # a layer, and experts, of another rank
        ],
    )
    @pytest.mark.parametrize("raw", [DENSE, SPARSE], ids=["dense", "sparse"])
    def test_layers_apart_where_they_differ(self, raw, ranks):
        hf = HFConfig.parse(raw)
        rules = adapter_rules(hf, ranks(hf))
        places = adapter_places(rules, hf)
        name = "self_attention.linear_proj.adapter.linear_in.weight"
        assert places[f"decoder.layers.2.{name}"] == Place(f"decoder.layers.2.{name}")
        if hf.num_experts:
            name = "linear_fc2.adapter.linear_in.weight"
            place = places[f"decoder.layers.2.mlp.experts.local_experts.3.{name}"]
            assert place == Place(f"decoder.layers.2.mlp.experts.experts.3.{name}")
        assert len({(place.key, place.index) for place in places.values()}) == len(rules)

    @pytest.mark.parametrize(
        "ranks",
        [
            lambda hf: dict.fromkeys(modules(hf), 4),
            lambda hf: dict.fromkeys([name for name in modules(hf) if name.endswith(("q_proj", "down_proj"))], 4),
            lambda hf: dict.fromkeys(modules(hf, layers=[1]), 4),
            lambda hf: {name: 2 + number % 3 for number, name in enumerate(modules(hf))},
        ],
    )
    @pytest.mark.parametrize("raw", [DENSE, SPARSE], ids=["dense", "sparse"])
    def test_the_shapes_in_a_checkpoint_say_the_ranks(self, raw, ranks):
        hf = HFConfig.parse(raw)
        rules = adapter_rules(hf, ranks(hf))
        places = adapter_places(rules, hf)
        shapes = {places[rule.name].key: (*places[rule.name].leading, *rule.whole) for rule in rules}
        assert stored_ranks(shapes | {"decoder.layers.mlp.linear_fc1.weight": (3, 96, 32)}, hf) == ranks(hf)
        assert all(is_adapter(key) for key in shapes)

    def test_a_checkpoint_without(self):
        assert stored_ranks({"decoder.layers.mlp.linear_fc1.weight": (3, 96, 32)}, HFConfig.parse(DENSE)) == {}


def test_column_parallel_splits_rows():
    rule = ColumnParallel(name="n", hf="h", shape=(8, 3))
    content = torch.arange(24).view(8, 3)
    assert rule.load(lambda _, index: content[index], 1, 4, (2, 3)).tolist() == content[2:4].tolist()
