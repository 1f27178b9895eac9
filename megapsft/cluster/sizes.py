"""How many parameters a rank holds, by pipeline stage, from the table of rules that imports and exports them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megapsft.config import LoRAConfig
from megapsft.models.adapters import trained_rules
from megapsft.models.families import layer_rules
from megapsft.models.hf_config import HFConfig
from megapsft.models.parameters import Rule
from megapsft.parallel import Mesh
from megapsft.policy.build import padded_vocab_size

ALIGNED = 64  # Megatron's distributed optimizer starts each parameter at a multiple of so many
DIVISIBLE = 128  # and makes the whole a multiple of so many, and of the number of ranks


@dataclass(frozen=True)
class Numbers:
    """Of some tensors: how many numbers they hold, and with each tensor rounded up as the distributed optimizer does."""

    plain: int = 0
    aligned: int = 0

    def __add__(self, other: Numbers) -> Numbers:
        return Numbers(self.plain + other.plain, self.aligned + other.aligned)

    def __mul__(self, times: int) -> Numbers:
        return Numbers(self.plain * times, self.aligned * times)


def of_tensor(size: int) -> Numbers:
    return Numbers(size, round_up(size, ALIGNED))


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class Parameters:
    """On one rank; `expert` are those that are reduced over other ranks than the rest, since experts are split over ranks."""

    dense: Numbers
    expert: Numbers

    @property
    def total(self) -> int:
        return self.dense.plain + self.expert.plain


@lru_cache(maxsize=4096)
def of_layer(hf: HFConfig, tp: int, ep: int, etp: int) -> Parameters:
    """A decoder layer on one rank."""
    return _on_rank(layer_rules(hf), tp, ep, etp)


@lru_cache(maxsize=4096)
def products_of_layer(hf: HFConfig, tp: int, ep: int, etp: int) -> int:
    """Of those of a decoder layer on one rank, the weights of linear layers: of attention, MLP and experts, not of the router."""
    return _on_rank([rule for rule in layer_rules(hf) if len(rule.whole) == 2 and ".router." not in rule.name], tp, ep, etp).total


@lru_cache(maxsize=4096)
def adapters_of_layer(hf: HFConfig, lora: LoRAConfig, tp: int, ep: int, etp: int) -> Parameters:
    """The adapters beside a decoder layer, on one rank."""
    return _on_rank(trained_rules(dataclasses.replace(hf, num_hidden_layers=1), lora), tp, ep, etp)


def _on_rank(rules: Sequence[Rule], tp: int, ep: int, etp: int) -> Parameters:
    dense, experts = Numbers(), Numbers()
    for rule in rules:
        if rule.expert:
            experts += of_tensor(local_size(rule, etp))
        else:
            dense += of_tensor(local_size(rule, tp))
    mine = Numbers(experts.plain // ep, experts.aligned // ep)  # all experts are alike
    return Parameters(dense, mine) if ep > 1 else Parameters(dense + mine, Numbers())


def local_size(rule: Rule, size: int) -> int:
    """Numbers of the parameter on one of `size` ranks."""
    return math.prod(rule.whole) // (size if rule.axis is not None else 1)


def of_chunk(hf: HFConfig, mesh: Mesh, divisible_by: int, stage: int, chunk: int) -> Parameters:
    """One model chunk of pipeline stage `stage`; chunks are counted from 0, mesh.vpp of them a stage."""
    layer = of_layer(hf, mesh.tp, mesh.ep, mesh.etp)
    layers = hf.num_hidden_layers // (mesh.pp * mesh.vpp)
    dense, expert = layer.dense * layers, layer.expert * layers
    vocabulary = of_tensor(padded_vocab_size(hf.vocab_size, divisible_by, mesh.tp) // mesh.tp * hf.hidden_size)
    first, last = stage == chunk == 0, (stage, chunk) == (mesh.pp - 1, mesh.vpp - 1)
    if first:
        dense += vocabulary
    if last:
        dense += of_tensor(hf.hidden_size)  # the last norm
        if not (hf.tie_word_embeddings and first):  # tied ones are copied to the last stage, where that is another
            dense += vocabulary
    return Parameters(dense, expert)


def of_stage(hf: HFConfig, mesh: Mesh, divisible_by: int, stage: int) -> tuple[Parameters, ...]:
    """All chunks of a pipeline stage."""
    return tuple(of_chunk(hf, mesh, divisible_by, stage, chunk) for chunk in range(mesh.vpp))


def trained_of_stage(hf: HFConfig, mesh: Mesh, divisible_by: int, lora: LoRAConfig, stage: int) -> tuple[Parameters, ...]:
    """What of the chunks of a pipeline stage is trained: all of it, or the adapters alone."""
    if lora.rank is None:
        return of_stage(hf, mesh, divisible_by, stage)
    layer, layers = adapters_of_layer(hf, lora, mesh.tp, mesh.ep, mesh.etp), hf.num_hidden_layers // (mesh.pp * mesh.vpp)
    return (Parameters(layer.dense * layers, layer.expert * layers),) * mesh.vpp


def replicas(mesh: Mesh) -> tuple[int, int]:
    """Over how many ranks gradients are reduced: of what is not an expert, and of experts."""
    return mesh.dp * mesh.cp, mesh.world_size // (mesh.etp * mesh.ep * mesh.pp)
