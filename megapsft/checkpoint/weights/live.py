"""The weights of a live model, spread over all ranks, as Hugging Face tensors on the first one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megapsft.checkpoint.weights import Stored, Weights, rows_of
from megapsft.checkpoint.weights.held_in_fp8 import values
from megapsft.checkpoint.weights.lora import add_product
from megapsft.config import LoRAConfig
from megapsft.errors import Refused
from megapsft.models.adapters import PREFIX, A, B, is_adapter, trained_rules
from megapsft.models.families import family_of
from megapsft.models.hf_config import HFConfig
from megapsft.models.names import OUTPUT, canonical_name
from megapsft.models.parameters import Block, Box, Rule, Shape, gather
from megapsft.policy.build import unwrap

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Part(NamedTuple):
    """A rectangle of a parameter on the rank that hands it out."""

    owner: int  # global rank
    at: int  # its first row in that rank's shard


class _Parameter(NamedTuple):
    name: str
    blocks: list[Block]
    boxes: list[Box]
    parts: list[_Part]


class LiveWeights:
    """Implements Weights, collectively: all ranks read the same rows in the same order, and rank 0 gets them.

    Of each shard one owner sends the rows to rank 0, so that no rank holds more than its own parameters, and rank 0 beyond that
    no more than the rows that are read. Tensors are in the parameters' dtype.

    Args:
        chunks: this rank's GPTModels, wrapped or not.
        rules: of the family, or of the adapters beside it.

    Raises:
        Refused: the model has a parameter that the rules do not know, or no rank has one that they do.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], hf: HFConfig, rules: Sequence[Rule]):
        self._parameters = local_parameters(chunks, hf, rules)
        self._device = next(iter(self._parameters.values())).device
        self._rank = dist.get_rank()
        self.tensors: dict[str, Stored] = {}
        self._of: dict[str, _Parameter] = {}
        for rule, (owners, dtype, shape) in zip(rules, whereabouts(rules, self._parameters), strict=True):
            boxes, parts = [], []
            for rank, owner in enumerate(owners[:1] if rule.axis is None else owners):
                at = 0
                for box in rule.boxes(rank, len(owners), shape):
                    boxes.append(box)
                    parts.append(_Part(owner, at))
                    at += box.rows
            parameter = _Parameter(rule.name, rule.blocks(), boxes, parts)
            for name, size in rule.sources.items():
                self.tensors[name] = Stored(size, dtype)
                self._of[name] = parameter

    @torch.no_grad()
    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Fill `out`, [stop - start, ...] on the CPU of rank 0, with rows of the tensor; on other ranks it is left as it is."""
        parameter, dtype = self._of[name], self.tensors[name].dtype

        def fill(number: int, first: int, last: int, into: Tensor) -> None:
            box, part = parameter.boxes[number], parameter.parts[number]
            rows = None
            if self._rank == part.owner:
                low = part.at + first - box.row
                rows = values(self._parameters[parameter.name])[low : low + last - first]
            if part.owner != 0 and self._rank == part.owner:
                dist.send(rows.contiguous(), dst=0)
            elif part.owner != 0 and self._rank == 0:
                rows = torch.empty(into.shape, dtype=dtype, device=self._device)
                dist.recv(rows, src=part.owner)
            if self._rank == 0:
                into.copy_(rows.reshape(into.shape))

        gather(parameter.blocks, name, start, parameter.boxes, fill, out)


class LiveMerged:
    """The same with the adapters that are trained beside the weights merged into them, as an export of the run merges them.

    Beyond what LiveWeights needs, rank 0 holds the two matrices of one adapter.

    Args:
        lora: what is trained.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], hf: HFConfig, lora: LoRAConfig):
        self._base = LiveWeights(chunks, hf, family_of(hf).parameters(hf))
        self._adapter = LiveWeights(chunks, hf, trained_rules(hf, lora))
        self.tensors = self._base.tensors
        self._scaling = lora.alpha / lora.rank

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """As `LiveWeights.read`."""
        self._base.read(name, start, stop, out)
        a, b = (PREFIX + name.removesuffix(".weight") + half for half in (A, B))
        if a not in self._adapter.tensors:
            return
        down, up = (rows_of(self._adapter, half).float() for half in (a, b))
        if dist.get_rank() == 0:
            add_product(out, out, start, len(up), lambda first, last: up[first:last], down, self._scaling)


def live_weights(chunks: Sequence[torch.nn.Module], hf: HFConfig) -> Weights:
    """The weights of a live model, adapters merged where it has some. Collective."""
    lora = lora_of(chunks)
    return LiveWeights(chunks, hf, family_of(hf).parameters(hf)) if lora is None else LiveMerged(chunks, hf, lora)


def lora_of(chunks: Sequence[torch.nn.Module]) -> LoRAConfig | None:
    """What adapters the model has."""
    return getattr(unwrap(chunks[0]), "lora", None)


def local_parameters(chunks: Sequence[torch.nn.Module], hf: HFConfig, rules: Sequence[Rule]) -> dict[str, torch.nn.Parameter]:
    """The parameters of this rank by their canonical names: those of adapters, or of the model without them, as the rules are.

    Raises:
        Refused: one name twice, or one that there is no rule for.
    """
    known = {rule.name for rule in rules} | {OUTPUT}
    of_adapters = is_adapter(rules[0].name)
    expert_offset = 0
    if hf.num_experts:
        here = hf.num_experts // parallel_state.get_expert_model_parallel_world_size()
        expert_offset = here * parallel_state.get_expert_model_parallel_rank()
    found: dict[str, torch.nn.Parameter] = {}
    for chunk in chunks:
        model = unwrap(chunk)
        layers = model.decoder.layers
        layer_offset = layers[0].layer_number - 1 if len(layers) else 0
        for local_name, parameter in model.named_parameters():
            name = canonical_name(local_name, layer_offset, expert_offset)
            if is_adapter(name) != of_adapters:
                continue
            if name not in known or name in found:
                rule = "is there twice" if name in found else f"is not a parameter of {hf.architecture}"
                raise Refused(f"parameter {name}", rule, "build the model with the family's own config and layer spec")
            found[name] = parameter
    return found


def whereabouts(
    rules: Sequence[Rule], parameters: Mapping[str, torch.nn.Parameter]
) -> list[tuple[list[int], torch.dtype, Shape]]:
    """Of every rule's parameter, by one all-reduce: who hands out each shard, the dtype, the shape of a shard. Collective.

    Of the ranks that hold a shard the lowest hands it out.

    Raises:
        Refused: no rank has a parameter for some rule, so that its weights would be lost in silence.
    """
    index = {rule.name: number for number, rule in enumerate(rules)}
    absent = torch.iinfo(torch.int64).max
    dense = parallel_state.get_tensor_model_parallel_world_size()
    expert = parallel_state.get_expert_tensor_parallel_world_size()
    ranks = max(dense, expert)
    device = next(iter(parameters.values())).device
    table = torch.full((len(rules), ranks + 3), absent, dtype=torch.int64)  # owners, dtype, rows, columns
    for name, parameter in parameters.items():
        if name in index:  # not so the copy of tied embeddings
            row = table[index[name]]
            row[rank_and_size(rules[index[name]])[0]] = dist.get_rank()
            row[ranks] = DTYPES.index(parameter.dtype)
            row[ranks + 1 : ranks + 1 + parameter.dim()] = torch.tensor(parameter.shape)
    table = table.to(device)
    dist.all_reduce(table, op=dist.ReduceOp.MIN)
    places = []
    for rule, row in zip(rules, table.tolist(), strict=True):
        owners = row[: expert if rule.expert else dense]
        if absent in owners:
            remedy = "build the model with the family's own config and layer spec"
            raise Refused(f"parameter {rule.name}", "is not in the model, but in the checkpoint", remedy)
        places.append((owners, DTYPES[row[ranks]], tuple(size for size in row[ranks + 1 :] if size != absent)))
    return places


def rank_and_size(rule: Rule) -> tuple[int, int]:
    """This rank's place in the tensor-parallel group that splits the rule's parameter."""
    if rule.expert:
        return parallel_state.get_expert_tensor_parallel_rank(), parallel_state.get_expert_tensor_parallel_world_size()
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
