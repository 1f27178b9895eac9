"""Rules that say which tensors of a Hugging Face checkpoint make up a parameter of Megatron, read in both directions.

A rule only cuts and joins; no number is changed, so import followed by export gives every tensor back bit by bit. Names of
Megatron are the canonical ones of `names.py`: layers and experts are counted over the whole model. A family writes its rules
with `{layer}` and `{expert}` in the names; `expand` makes one rule of each for every layer and expert.

Everything that converts (a live model in and out, a torch_dist checkpoint in and out) reads the same two things of a rule: its
`blocks`, which rows of the parameter are which rows of which tensor, and its `boxes`, which rectangle a shard is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]
Index = slice | tuple[slice, ...]
Read = Callable[[str, Index], Tensor]  # (name of a Hugging Face tensor, which part of it) -> that part
Fill = Callable[[int, int, int, Tensor], None]  # (number of a box, first row, last row + 1, where to put them)


class Block(NamedTuple):
    """Rows of a whole parameter that are rows of one Hugging Face tensor."""

    row: int  # the first, in the parameter
    rows: int
    hf: str
    start: int  # the first, in the tensor


class Box(NamedTuple):
    """A rectangle of a whole parameter that lies in one place, such as on one rank; one column where there is one dimension."""

    row: int
    rows: int
    column: int
    columns: int


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """One parameter of Megatron and the tensors it comes from."""

    axis: ClassVar[int | None] = 0  # which dimension tensor parallelism splits
    parts: ClassVar[int] = 1  # equal parts of the rows, each of which is split by itself
    padded: ClassVar[bool] = False  # Megatron may have more rows than the Hugging Face tensor

    name: str  # Megatron's
    hf: str  # Hugging Face's; `{part}` stands for the parts where there are several
    shape: Shape  # of the whole Hugging Face tensor; of the first part where there are several
    expert: bool = False  # split over the expert-tensor-parallel group instead of the tensor-parallel one

    @property
    def sources(self) -> dict[str, Shape]:
        """The Hugging Face tensors that the parameter is made of, with their whole shapes, in the order of export."""
        return {self.hf: self.shape}

    @abstractmethod
    def blocks(self) -> list[Block]:
        """All rows of the parameter, in its order; of each Hugging Face tensor in the tensor's own order."""

    @property
    def whole(self) -> Shape:
        """Shape of the parameter before any split, the vocabulary unpadded."""
        return (sum(shape[0] for shape in self.sources.values()), *self.shape[1:])

    def boxes(self, rank: int, size: int, shape: Shape) -> list[Box]:
        """What the shard of `rank` in a tensor-parallel group (the expert one where `expert`) of `size` ranks holds.

        Args:
            shape: of the shard as Megatron allocated it, which pads the vocabulary.

        Returns:
            Rectangles that lie below each other in the shard.
        """
        rows, columns = self.whole[0], math.prod(self.whole[1:])
        if self.axis is None:
            return [Box(0, rows, 0, columns)]
        if self.axis == 1:
            return [Box(0, rows, rank * shape[1], shape[1])]
        share, part = shape[0] // self.parts, shape[0] * size // self.parts
        return [Box(number * part + rank * share, share, 0, columns) for number in range(self.parts)]

    def load(self, read: Read, rank: int, size: int, shape: Shape) -> Tensor:
        """The shard of `rank`, as a new tensor or as what `read` gave. Arguments as of `boxes`.

        Args:
            read: gives parts of Hugging Face tensors; only what the shard needs is asked for.
        """
        pieces = []
        for row, rows, column, columns in self.boxes(rank, size, shape):
            for block in overlaps(self.blocks(), row, row + rows):
                index: Index = slice(block.start, block.start + block.rows)
                if self.axis == 1:
                    index = (index, slice(column, column + columns))
                pieces.append(read(block.hf, index))
            padding = row + rows - max(row, min(self.whole[0], row + rows))
            if padding:
                like = pieces[-1] if pieces else read(self.hf, slice(0, 0))
                pieces.append(like.new_zeros(padding, *self.shape[1:]))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def overlaps(blocks: Sequence[Block], start: int, stop: int) -> Iterator[Block]:
    """The parts of the blocks that lie in the rows `start` to `stop` of the parameter."""
    for row, rows, hf, first in blocks:
        low, high = max(row, start), min(row + rows, stop)
        if low < high:
            yield Block(low, high - low, hf, first + low - row)


def gather(blocks: Sequence[Block], name: str, start: int, boxes: Sequence[Box], fill: Fill, out: Tensor) -> None:
    """Rows of a Hugging Face tensor out of the rectangles that a parameter was cut into.

    Args:
        blocks: of the parameter's rule.
        name: of the tensor.
        start: its first row that is asked for; as many as `out` has.
        fill: copies rows of a box, counted in the whole parameter, to a view [rows, columns of the box].
        out: [rows, ...], filled where a box has it.
    """
    flat = out.reshape(len(out), -1) if out.dim() != 2 else out
    stop = start + len(out)
    for row, rows, hf, first in blocks:
        low, high = max(first, start), min(first + rows, stop)
        if hf != name or low >= high:
            continue
        shift = row - first
        for number, box in enumerate(boxes):
            top, bottom = max(box.row, low + shift), min(box.row + box.rows, high + shift)
            if top < bottom:
                part = flat[top - shift - start : bottom - shift - start, box.column : box.column + box.columns]
                fill(number, top, bottom, part)


@dataclass(frozen=True, kw_only=True)
class Replicated(Rule):
    """The same tensor on every rank."""

    axis = None

    def blocks(self) -> list[Block]:
        return [Block(0, self.shape[0], self.hf, 0)]


@dataclass(frozen=True, kw_only=True)
class RowParallel(Rule):
    """Columns (inputs, dimension 1) split over the ranks."""

    axis = 1

    def blocks(self) -> list[Block]:
        return [Block(0, self.shape[0], self.hf, 0)]


@dataclass(frozen=True, kw_only=True)
class Vocab(Rule):
    """Rows split over the ranks after zeros were added below, to as many as Megatron allocated."""

    padded = True

    def blocks(self) -> list[Block]:
        return [Block(0, self.shape[0], self.hf, 0)]


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
        names = (self.hf.replace("{part}", part) for part in "qkv")
        return dict(zip(names, (self.shape, keys, keys), strict=True))

    def blocks(self) -> list[Block]:
        found, row = [], 0
        for group in range(self.groups):
            for name, (total, *_) in self.sources.items():
                rows = total // self.groups
                found.append(Block(row, rows, name, group * rows))
                row += rows
        return found


@dataclass(frozen=True, kw_only=True)
class GatedMLP(Rule):
    """Gate and up projections in one: on each rank its rows of the gate, then its rows of up. `hf` has `{part}` for them."""

    parts = 2

    @property
    def sources(self) -> dict[str, Shape]:
        return dict.fromkeys((self.hf.replace("{part}", part) for part in ("gate", "up")), self.shape)

    def blocks(self) -> list[Block]:
        rows = self.shape[0]
        return [Block(number * rows, rows, name, 0) for number, name in enumerate(self.sources)]


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
