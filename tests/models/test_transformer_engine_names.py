"""Transformer Engine's names of parameters, as recorded, against each family's table: one to one, in both directions.

The record says whether it was made on a GPU; `python -m tests.gpu.record_names` makes it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megapsft.checkpoint import random_init
from megapsft.models.families import family_of
from megapsft.models.hf_config import HFConfig
from megapsft.models.names import EMBEDDING, OUTPUT, canonical_name

RECORD = json.loads((Path(__file__).parent / "te_names.json").read_text())
FAMILIES = RECORD["families"]
LINEAR = {"self_attention.linear_qkv": "TELayerNormColumnParallelLinear", "self_attention.linear_proj": "TERowParallelLinear",
          "self_attention.core_attention": "TEDotProductAttention", "input_layernorm": "IdentityOp"}  # fmt: skip
DENSE = {"pre_mlp_layernorm": "IdentityOp", "mlp": "MLP", "mlp.linear_fc1": "TELayerNormColumnParallelLinear",
         "mlp.linear_fc2": "TERowParallelLinear"}  # fmt: skip
SPARSE = {"pre_mlp_layernorm": "RMSNorm", "mlp": "MoELayer", "mlp.router": "Router", "mlp.experts": "TEGroupedMLP",
          "mlp.experts.linear_fc1": "TEColumnParallelGroupedLinear",
          "mlp.experts.linear_fc2": "TERowParallelGroupedLinear"}  # fmt: skip


def test_every_family_is_recorded():
    assert set(FAMILIES) == set(random_init.FAMILIES)


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def rules_of(family):
    hf = HFConfig.parse(family["config"])
    return hf, {rule.name: rule for rule in family_of(hf).parameters(hf)}


def test_names_map_one_to_one_onto_the_table(family):
    _, rules = rules_of(family)
    canonical = [canonical_name(name, 0, 0) for name, _ in family["parameters"]]
    assert len(set(canonical)) == len(canonical)
    assert set(canonical) == set(rules)


def test_shapes_are_those_of_the_table(family):
    hf, rules = rules_of(family)
    for name, shape in family["parameters"]:
        rule = rules[canonical_name(name, 0, 0)]
        whole = tuple(shape)
        if rule.name in (EMBEDDING, OUTPUT):
            assert shape[0] >= hf.vocab_size
            whole = (hf.vocab_size, *shape[1:])
        assert whole == tuple(rule.whole), name


def test_layers_and_experts_of_a_rank_are_counted_over_the_whole_model():
    for name, _ in FAMILIES["qwen3_moe"]["parameters"]:
        there = canonical_name(name, layer_offset=2, expert_offset=4)
        here = canonical_name(name, 0, 0)
        assert (there == here) == (not name.startswith("decoder.layers."))
    assert canonical_name("decoder.layers.1.mlp.experts.linear_fc2.weight3", 2, 4) == (
        "decoder.layers.3.mlp.experts.local_experts.7.linear_fc2.weight"
    )


def test_every_place_of_a_layer_has_the_module_that_it_should(family):
    hf, modules = HFConfig.parse(family["config"]), family["modules"]
    expected = LINEAR | (SPARSE if hf.num_experts else DENSE)
    if family_of(hf).qk_layernorm:
        expected |= {"self_attention.q_layernorm": "RMSNorm", "self_attention.k_layernorm": "RMSNorm"}
    else:
        expected |= {"self_attention.q_layernorm": "IdentityOp", "self_attention.k_layernorm": "IdentityOp"}
    assert {place: modules[place] for place in expected if place in modules} == expected
