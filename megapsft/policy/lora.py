"""LoRA: the model's weights stay as they are, and beside those of some linear layers two small matrices are trained.

    y = W x + alpha / r B A x        A [r, inputs], B [outputs, r]

Source: LoRA (Hu et al., ICLR 2022), section 4.1. Matrices are split as `models/adapters.py` has it, and each rank computes what
of the product is its own, at the price of r numbers a token instead of a hidden state between ranks of a tensor group:

    outputs split   A is gathered; A x of this rank's tokens is gathered (or is the same on all ranks); B's rows are the rank's
    inputs split    A's columns are the rank's; sums A x are reduced (or scattered); B is gathered
    experts         as Megatron has it for them, their tokens are gathered, and their outputs added up, outside of the layer
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megapsft.config import LoRAConfig

PROJECTIONS = {  # in Megatron's linear layer: in the order of its rows, the end of the adapter's name and PEFT's module
    "linear_qkv": (("adapter_q", "q_proj"), ("adapter_k", "k_proj"), ("adapter_v", "v_proj")),
    "linear_proj": (("", "o_proj"),),
    "linear_fc1": (("adapter_gate", "gate_proj"), ("adapter_up", "up_proj")),
    "linear_fc2": (("", "down_proj"),),
}
INPUTS_SPLIT = ("linear_proj", "linear_fc2")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the adapters of a linear layer lie in it, on this rank."""

    scaling: float
    groups: int  # of rows, in each of which all projections have some: of q, k and v one for each key-value head
    widths: tuple[int, ...]  # rows of a group, by projection
    trained: tuple[str | None, ...]  # by projection the adapter's name, "" where there is but one, None where it has none
    inputs_split: bool  # over the ranks of `group`; else outputs are
    tokens_split: bool  # outside of the layer (sequence parallelism)
    expert: bool
    normed: bool  # the layer begins with a norm, whose output the adapters read
    group: dist.ProcessGroup


class Matrix(torch.nn.Module):
    """A or B of one adapter, `weight`, or those of all experts of a rank, `weight0`, `weight1`, ...

    It is called for its weight: before a module's call Megatron waits for those of its parameters that are still gathered.
    """

    def __init__(self, shape: tuple[int, int], like: Sequence[torch.nn.Parameter], grouped: bool, axis: int):
        super().__init__()
        for number, base in enumerate(like):
            weight = torch.nn.Parameter(torch.empty(shape, dtype=base.dtype, device=base.device))
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=axis, stride=1)
            weight.allreduce = getattr(base, "allreduce", True)  # Megatron's mark of experts that are split over ranks: False
            self.register_parameter(f"weight{number}" if grouped else "weight", weight)

    def forward(self, expert: int | None = None) -> Tensor:
        return getattr(self, "weight" if expert is None else f"weight{expert}")


class Pair(torch.nn.Module):
    """A and B."""

    def __init__(self, linear_in: Matrix, linear_out: Matrix):
        super().__init__()
        self.linear_in, self.linear_out = linear_in, linear_out


class LoRALinear:
    """What a linear layer of Megatron or Transformer Engine becomes, whose class comes behind this one.

    It stays the module that Megatron built, with the same weight and the same key in checkpoints.
    """

    adapter: torch.nn.Module
    lora: Layout

    def forward(self, input_: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """[S, B, inputs] or [T, inputs] -> [.., outputs], with all splits as without adapters; and Megatron's bias."""
        output, bias = super().forward(input_, *args, **options)
        if self.lora.normed:
            output, input_ = output
        return output + self._delta(input_), bias

    def _delta(self, input_: Tensor, expert: int | None = None) -> Tensor:
        pairs = self._pairs()
        make = _of_split_inputs if self.lora.inputs_split else _of_split_outputs
        there = [(pair.linear_in(expert), pair.linear_out(expert)) for pair in pairs if pair is not None]
        found = iter(make(input_, [a for a, _ in there], [b for _, b in there], self.lora))
        whole = [next(found) if pair is not None else None for pair in pairs]
        if len(whole) == 1:
            return whole[0]
        like, groups = next(part for part in whole if part is not None), self.lora.groups
        rows = [
            like.new_zeros(*like.shape[:-1], groups, width) if part is None else part.unflatten(-1, (groups, width))
            for part, width in zip(whole, self.lora.widths, strict=True)
        ]
        return torch.cat(rows, dim=-1).flatten(-2)

    def _pairs(self) -> list[Pair | None]:
        """By projection."""
        return [name if name is None else getattr(self.adapter, name) if name else self.adapter for name in self.lora.trained]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Megatron's for the layer, and the adapters by their own splits."""
        found = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        base = {key: value for key, value in found.items() if not key.startswith(f"{prefix}adapter.")}
        return base | self._sharded(dict(self.adapter.named_parameters(prefix="adapter")), prefix, sharded_offsets, metadata)

    def _sharded(self, tensors: dict[str, Tensor], prefix: str, offsets: tuple, metadata: dict | None) -> dict:
        axes = {name: parameter.partition_dim for name, parameter in tensors.items()}
        groups = dict(tp_group=self.lora.group, dp_cp_group=metadata["dp_cp_group"])
        return make_sharded_tensors_for_checkpoint(tensors, prefix, axes, offsets, **groups)


class LoRAGroupedLinear(LoRALinear):
    """The same for the layers of all experts of a rank in one, as Transformer Engine has them."""

    def forward(self, input_: Tensor, m_splits: list[int], *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """[T, inputs], the tokens of one expert after those of the other, so many of each as `m_splits` says -> [T, outputs]."""
        output, bias = super(LoRALinear, self).forward(input_, m_splits, *args, **options)
        tokens = input_.split(list(m_splits))
        return output + torch.cat([self._delta(mine, expert) for expert, mine in enumerate(tokens)]), bias

    def _sharded(self, tensors: dict[str, Tensor], prefix: str, offsets: tuple, metadata: dict | None) -> dict:
        """As Megatron has experts: a place on another leading axis for each, replicas counted over their own data parallelism."""
        found = {}
        ranks = parallel_state.get_expert_model_parallel_world_size()
        first = parallel_state.get_expert_model_parallel_rank() * self.num_gemms
        for expert in range(self.num_gemms):
            end = f".weight{expert}"
            mine = {name.removesuffix(str(expert)): tensor for name, tensor in tensors.items() if name.endswith(end)}
            place = (*offsets, (len(offsets), first + expert, ranks * self.num_gemms))
            for key, sharded in super()._sharded(mine, prefix, place, metadata).items():
                replica = parallel_state.get_expert_data_parallel_rank()
                sharded.replica_id = (*sharded.replica_id[:2], replica)
                found[f"{key}{expert}"] = sharded
        return found


def with_adapters(chunks: Sequence[GPTModel], lora: LoRAConfig) -> None:
    """Freeze the chunks, and give their linear layers adapters with uninitialised matrices; nothing where `lora` has no rank."""
    if lora.rank is None:
        return
    for gpt in chunks:
        gpt.lora = lora
        gpt.requires_grad_(False)
        for path, kind, layer in list(_linear_layers(gpt)):
            adopt(layer, kind, ".experts." in path, gpt.config, lora)
        if gpt.pre_process:  # or the first layers would have no gradient where they are recomputed from their input
            gpt.embedding.register_forward_hook(_require_gradient)


def _linear_layers(gpt: GPTModel) -> Iterator[tuple[str, str, torch.nn.Module]]:
    """(path, kind, module) of what can have an adapter."""
    for path, module in gpt.decoder.named_modules():
        kind = path.rpartition(".")[2]
        if kind in PROJECTIONS:
            yield path, kind, module


def adopt(layer: torch.nn.Module, kind: str, expert: bool, config: TransformerConfig, lora: LoRAConfig) -> None:
    """Make the linear layer one with adapters, in place; nothing where none of its projections is to have one.

    Args:
        kind: what Megatron calls it, one of PROJECTIONS.
        expert: whether it is of experts.
    """
    trained = tuple(name if module in lora.target_modules else None for name, module in PROJECTIONS[kind])
    if not any(name is not None for name in trained):
        return
    grouped = hasattr(layer, "num_gemms")
    base = [getattr(layer, f"weight{number}") for number in range(layer.num_gemms)] if grouped else [layer.weight]
    tensor, experts = parallel_state.get_tensor_model_parallel_group, parallel_state.get_expert_tensor_parallel_group
    group, (outputs, inputs) = experts() if expert else tensor(), base[0].shape
    groups, widths = 1, (outputs // len(trained),) * len(trained)
    if kind == "linear_qkv":
        groups = config.num_query_groups // group.size()
        heads = config.num_attention_heads // config.num_query_groups
        widths = (heads * config.kv_channels, config.kv_channels, config.kv_channels)
    normed = hasattr(layer, "layer_norm_weight")  # Transformer Engine's, fused
    if normed:
        layer.return_layernorm_output = True
    layout = Layout(
        scaling=lora.alpha / lora.rank,
        groups=groups,
        widths=widths,
        trained=trained,
        inputs_split=kind in INPUTS_SPLIT,
        tokens_split=config.sequence_parallel and not expert,
        expert=expert,
        normed=normed,
        group=group,
    )
    pairs = {name: _pair(lora.rank, inputs, groups * width, base, grouped, layout)
             for name, width in zip(trained, widths, strict=True) if name is not None}  # fmt: skip
    layer.lora, layer.adapter = layout, pairs[""] if "" in pairs else torch.nn.ModuleDict(pairs)
    layer.__class__ = _with_adapter(type(layer), grouped)


def _pair(
    rank: int, inputs: int, outputs: int, base: Sequence[torch.nn.Parameter], grouped: bool, layout: Layout
) -> Pair:
    """A and B of this rank; `inputs` and `outputs` are those of its part of the layer."""
    size = layout.group.size()
    if layout.inputs_split:
        shapes, axis = ((rank, inputs), (outputs // size, rank)), 1
    else:
        shapes, axis = ((rank // size, inputs), (outputs, rank)), 0
    return Pair(Matrix(shapes[0], base, grouped, axis), Matrix(shapes[1], base, grouped, 0))


@cache
def _with_adapter(kind: type, grouped: bool) -> type:
    """A class of linear layers, with adapters."""
    mixin = LoRAGroupedLinear if grouped else LoRALinear
    return type(f"LoRA{kind.__name__}", (mixin, kind), {})


def _of_split_outputs(input_: Tensor, downs: list[Tensor], ups: list[Tensor], layout: Layout) -> list[Tensor]:
    """By projection [.., its outputs on this rank]; `downs` are [r / p, inputs], `ups` [outputs / p, r]."""
    hidden = F.linear(input_, _gathered(downs, layout))
    if layout.group.size() > 1 and not layout.expert:  # backward, what the outputs of all ranks ask of it is added up
        if layout.tokens_split:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=layout.group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=layout.group)
    parts = (hidden * layout.scaling).chunk(len(ups), dim=-1)
    return [F.linear(part, up) for part, up in zip(parts, ups, strict=True)]


def _of_split_inputs(input_: Tensor, downs: list[Tensor], ups: list[Tensor], layout: Layout) -> list[Tensor]:
    """[[.., outputs]]; `downs` is one [r, inputs / p], `ups` one [outputs / p, r]."""
    hidden = F.linear(input_, downs[0])
    if layout.group.size() > 1 and not layout.expert:  # experts' outputs are added up outside
        if layout.tokens_split:
            hidden = reduce_scatter_to_sequence_parallel_region(hidden, group=layout.group)
        else:
            hidden = reduce_from_tensor_model_parallel_region(hidden, group=layout.group)
    return [F.linear(hidden * layout.scaling, _gathered(ups, layout))]


def _gathered(matrices: list[Tensor], layout: Layout) -> Tensor:
    """All rows of matrices that are split by rows, one matrix below the other.

    Their gradient on each rank is of its own tokens, or of its part of an expert, so the ranks' are added up; else the ranks
    have all of it alike.
    """
    if layout.group.size() == 1:
        return matrices[0] if len(matrices) == 1 else torch.cat(matrices)
    parts = layout.tokens_split or layout.expert
    whole = gather_from_sequence_parallel_region(torch.stack(matrices), tensor_parallel_output_grad=parts, group=layout.group)
    return whole.unflatten(0, (layout.group.size(), len(matrices))).transpose(0, 1).flatten(0, 2)


def _require_gradient(embedding: torch.nn.Module, arguments: tuple, output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_()
