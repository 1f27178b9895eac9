"""Rules that say which tensors of a Hugging Face checkpoint make up a parameter of Megatron, read in both directions.

A rule only cuts and joins; no number is changed, so import followed by export gives every tensor back bit by bit. Names of
Megatron are the canonical ones of `names.py`: layers and experts are counted over the whole model. A family writes its rules
with `{layer}` and `{expert}` in the names; `expand` makes one rule of each for every layer and expert.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Shape = tuple[int, ...]
Index = slice | tuple[slice, ...]
Read = Callable[[str, Index], Tensor]  # (name of a Hugging Face tensor, which part of it) -> that part


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """One parameter of Megatron and the tensors it comes from."""

    name: str  # Megatron's
    hf: str  # Hugging Face's; `{part}` stands for the parts where there are several
    shape: Shape  # of the whole Hugging Face tensor; of the first part where there are several
    expert: bool = False  # split over the expert-tensor-parallel group instead of the tensor-parallel one

    @property
    def sources(self) -> dict[str, Shape]:
        """The Hugging Face tensors that the parameter is made of, with their whole shapes, in the order of export."""
        return {self.hf: self.shape}

    @abstractmethod
    def load(self, read: Read, rank: int, size: int, shape: Shape) -> Tensor:
        """The shard of `rank` in a tensor-parallel group (the expert one where `expert`) of `size` ranks.

        Args:
            read: gives parts of Hugging Face tensors; only what the shard needs is asked for.
            shape: of the shard as Megatron allocated it. Only `Vocab` needs it: Megatron pads the vocabulary.
        """

    @abstractmethod
    def export(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        """The whole Hugging Face tensors, as copies, out of the shards of all ranks of the group in their order."""


@dataclass(frozen=True, kw_only=True)
class Replicated(Rule):
    """The same tensor on every rank."""

    def load(self, read: Read, rank: int, size: int, shape: Shape) -> Tensor:
        return read(self.hf, slice(None))

    def export(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        return {self.hf: shards[0].clone()}


@dataclass(frozen=True, kw_only=True)
class RowParallel(Rule):
    """Columns (inputs, dimension 1) split over the ranks."""

    def load(self, read: Read, rank: int, size: int, shape: Shape) -> Tensor:
        return read(self.hf, (slice(None), _part(self.shape[1], rank, size)))

    def export(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        return {self.hf: torch.cat(list(shards), dim=1)}


@dataclass(frozen=True, kw_only=True)
class Vocab(Rule):
    """Rows split over the ranks after zeros were added below, to as many as Megatron allocated."""

    def load(self, read: Read, rank: int, size: int, shape: Shape) -> Tensor:
        begin, end = (min(row, self.shape[0]) for row in (rank * shape[0], (rank + 1) * shape[0]))
        rows = read(self.hf, slice(begin, end))
        return torch.cat([rows, rows.new_zeros(shape[0] - len(rows), *shape[1:])])

    def export(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        return {self.hf: torch.cat(list(shards), dim=0)[: self.shape[0]]}


@dataclass(frozen=True, kw_only=True)
class QKV(Rule):
    """Query, key and value projections (or their biases) in one: for each key-value group its queries, its key, its value.

    `hf` has `{part}` for q, k, v; `shape` is that of the queries.
    """

    groups: int  # key-value heads
    head_dim: int

    @property
    def sources(self) -> dict[str, Shape]:
        keys = (self.groups * self.head_dim, *self.shape[1:])
        return dict(zip(self._names(), (self.shape, keys, keys), strict=True))

    def load(self, read: Read, rank: int, size: int, shape: Shape) -> Tensor:
        local = self.groups // size
        parts = [read(name, _part(whole[0], rank, size)) for name, whole in self.sources.items()]
        return torch.cat([part.unflatten(0, (local, -1)) for part in parts], dim=1).flatten(0, 1)

    def export(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        local = self.groups // len(shards)
        rows = (self.shape[0] // self.groups, self.head_dim, self.head_dim)  # of a group
        split = [shard.unflatten(0, (local, -1)).split(rows, dim=1) for shard in shards]
        parts = (torch.cat([groups.flatten(0, 1) for groups in part]) for part in zip(*split, strict=True))
        return dict(zip(self._names(), parts, strict=True))

    def _names(self) -> list[str]:
        return [self.hf.replace("{part}", part) for part in "qkv"]


@dataclass(frozen=True, kw_only=True)
class GatedMLP(Rule):
    """Gate and up projections in one: on each rank its rows of the gate, then its rows of up. `hf` has `{part}` for them."""

    @property
    def sources(self) -> dict[str, Shape]:
        return dict.fromkeys(self._names(), self.shape)

    def load(self, read: Read, rank: int, size: int, shape: Shape) -> Tensor:
        part = _part(self.shape[0], rank, size)
        return torch.cat([read(name, part) for name in self._names()])

    def export(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        halves = zip(*(shard.chunk(2, dim=0) for shard in shards), strict=True)
        return {name: torch.cat(part) for name, part in zip(self._names(), halves, strict=True)}

    def _names(self) -> list[str]:
        return [self.hf.replace("{part}", part) for part in ("gate", "up")]


def expand(rules: Sequence[Rule], num_layers: int, num_experts: int | None) -> tuple[Rule, ...]:
    """Rules with numbers for `{layer}` and `{expert}`: what is in no layer stays in place, the others come layer by layer.

    The rules of layers must stand together in `rules`; those of experts among them come expert by expert in the same way.
    """
    return tuple(_repeat(rules, "{layer}", num_layers, lambda layer: _repeat(layer, "{expert}", num_experts or 0, iter)))


def parameter_count(rules: Sequence[Rule]) -> int:
    """How many numbers the tensors of the rules hold, the vocabulary unpadded; a tied output layer counts once."""
    return sum(math.prod(shape) for rule in rules for shape in rule.sources.values())


def _repeat(rules: Sequence[Rule], field: str, times: int, inner: Callable[[Sequence[Rule]], Iterator[Rule]]) -> Iterator[Rule]:
    """The rules, those with `field` in their name once for each number, as a block where the first of them stands."""
    block = [rule for rule in rules if field in rule.name]
    for rule in rules:
        if field not in rule.name:
            yield rule
        elif rule is block[0]:
            for number in range(times):
                at = [replace(r, name=r.name.replace(field, str(number)), hf=r.hf.replace(field, str(number))) for r in block]
                yield from inner(at)


def _part(length: int, rank: int, size: int) -> slice:
    """The rank's share of `length` rows in equal parts."""
    share = length // size
    return slice(rank * share, (rank + 1) * share)
