"""Adapters beside layers of Transformer Engine, which are not here: stand-ins have the parts of their interface that matter.

Beside Megatron's own layers they are proved in tests/invariants/test_lora.py and tests/e2e/test_lora.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state

from megapsft.config import LoRAConfig, ParallelConfig
from megapsft.parallel import initialize, plan_mesh, shutdown
from megapsft.policy.lora import PROJECTIONS, adopt
from tests.ranks import run_ranks

INPUTS, OUTPUTS, EXPERTS, HEADS = 12, 16, 3, 4


class Grouped(torch.nn.Module):
    """As TEGroupedLinear: the weights of all experts of a rank in one module, and tokens in the order of experts."""

    num_gemms = EXPERTS

    def __init__(self):
        super().__init__()
        for number in range(EXPERTS):
            self.register_parameter(f"weight{number}", torch.nn.Parameter(torch.randn(OUTPUTS, INPUTS)))

    def forward(self, input_, m_splits):
        parts = zip(input_.split(m_splits), self.parameters(recurse=False), strict=True)
        return torch.cat([F.linear(tokens, weight) for tokens, weight in parts]), None

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        return {f"{prefix}weight{number}": None for number in range(EXPERTS)}


class Normed(torch.nn.Module):
    """As TELayerNormColumnParallelLinear: a norm before the product, which gives its output too where it is asked."""

    return_layernorm_output = False

    def __init__(self):
        super().__init__()
        self.layer_norm_weight = torch.nn.Parameter(torch.rand(INPUTS))
        self.weight = torch.nn.Parameter(torch.randn(2 * OUTPUTS, INPUTS))

    def forward(self, input_):
        normed = F.rms_norm(input_, (INPUTS,), self.layer_norm_weight)
        output = F.linear(normed, self.weight)
        return ((output, normed) if self.return_layernorm_output else output), None


class Config:
    sequence_parallel, num_query_groups, num_attention_heads, kv_channels = False, 2, HEADS, OUTPUTS // HEADS


def on_one_rank(check):
    parallel = ParallelConfig()
    shape = type("Shape", (), dict(num_layers=1, num_attention_heads=1, num_query_groups=1, ffn_hidden_size=1, num_experts=None))
    initialize(plan_mesh(parallel, 1, shape, False, "alltoall"), parallel, seed=1)
    torch.manual_seed(0)
    found = check()
    shutdown()
    return found


def filled(layer):
    for parameter in layer.adapter.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def grouped():
    layer = Grouped()
    base = layer(tokens := torch.randn(9, INPUTS), splits := [4, 0, 5])[0]
    adopt(layer, "linear_fc2", True, Config, LoRAConfig(rank=4, alpha=8))
    pair = filled(layer).adapter
    a, b = ([getattr(half, f"weight{number}") for number in range(EXPERTS)] for half in (pair.linear_in, pair.linear_out))
    delta = torch.cat([2 * part @ a[n].T @ b[n].T for n, part in enumerate(tokens.split(splits))])
    found = layer(tokens, splits)[0]
    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    sharded = layer.sharded_state_dict("linear_fc2.", ((0, 1, 5),), groups)
    places = {name: (part.key, part.global_offset, part.global_shape) for name, part in sharded.items() if part is not None}
    return (found - base - delta).abs().max().item(), delta.abs().max().item(), places


def normed():
    layer = Normed()
    base = layer(tokens := torch.randn(9, INPUTS))[0]
    adopt(layer, "linear_fc1", False, Config, LoRAConfig(rank=4, alpha=8, target_modules=("up_proj",)))
    up = filled(layer).adapter.adapter_up
    inside = F.rms_norm(tokens, (INPUTS,), layer.layer_norm_weight)
    delta = 2 * inside @ up.linear_in.weight.T @ up.linear_out.weight.T
    found = layer(tokens)[0]
    whole = torch.cat([torch.zeros_like(delta), delta], dim=-1)  # gate has none
    return (found - base - whole).abs().max().item(), delta.abs().max().item()


def test_experts_in_one_module_have_adapters_of_their_own():
    wrong, size, places = run_ranks(1, on_one_rank, grouped)[0]
    assert wrong < 1e-4 < size
    for half, shape in (("linear_in", (4, INPUTS)), ("linear_out", (OUTPUTS, 4))):
        for number in range(EXPERTS):
            place = (f"linear_fc2.adapter.{half}.weight", (1, number, 0, 0), (5, EXPERTS, *shape))
            assert places[f"linear_fc2.adapter.{half}.weight{number}"] == place
    assert len(places) == 2 * EXPERTS


def test_adapters_read_what_a_fused_norm_gives():
    wrong, size = run_ranks(1, on_one_rank, normed)[0]
    assert wrong < 1e-4 < size


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_every_kind_of_layer_has_the_projections_of_peft(kind):
    assert {module for _, module in PROJECTIONS[kind]} <= set(LoRAConfig().target_modules)
