"""The default: logits exist a slab at a time (tokens x some columns of this rank's vocabulary), twice.

The forward pass merges the statistics of the slabs; the backward pass makes each slab again, turns it into its gradient in its
place, and multiplies that out: the weight's gradient of a slab is written once, by one product over all tokens (more than
MOST_TOKENS take several, whose fp32 sum is of a slab's columns alone). Where Megatron's data parallelism gives the weight an fp32
`main_grad`, that product is added to it as it is: the sum over microbatches never passes through the model's dtype. Operands of
products are in the model's dtype, all else is fp32 (fp64 for fp64 models). Elementwise work goes by blocks of rows, which stay in
the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megapsft.platform.ranges import span
from megapsft.policy.head import statistics
from megapsft.policy.head.statistics import Known, Wanted, finish, merge, nothing
from megapsft.policy.head.weight_gradient import accumulate, gradient_of
from megapsft.types import VocabularyTerm

BLOCK_BYTES = 2**20  # of logits that elementwise work goes over several times
MOST_TOKENS = 8192  # in one slab: more would leave it too few columns
WIDE = 2048  # unless they leave it so many


@dataclass(frozen=True)
class Vocabulary:
    """This rank's columns, and what is asked of them."""

    group: dist.ProcessGroup | None
    first: int  # column of the whole vocabulary that is this rank's first
    columns: int  # without padding
    chunk_bytes: int
    temperature: float
    entropy_gradient: bool
    term: VocabularyTerm | None
    blocks: object = statistics  # the module whose `statistics` and `gradient` do the elementwise work

    @property
    def raw(self) -> dict[str, float]:
        """What `blocks` are told beside, where they read logits as the product left them and apply the temperature themselves."""
        return {"temperature": self.temperature} if getattr(self.blocks, "RAW_LOGITS", False) else {}


class Slabs(torch.autograd.Function):
    """(hidden [T, D], weight [V / p, D], labels [T], ref_hidden, ref_weight) -> log-probability, entropy, term: [T] each."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, ref_hidden, ref_weight, vocabulary):
        exact = torch.promote_types(hidden.dtype, torch.float32)
        term, labels = vocabulary.term, labels - vocabulary.first
        target = _targets(hidden, weight, labels, vocabulary, exact) if term is not None and term.h == "logsigmoid" else None
        stats = nothing(len(hidden), term, hidden, exact)
        keep = _fits(hidden, vocabulary) and term is None and not vocabulary.entropy_gradient and any(ctx.needs_input_grad)
        kept = None
        room, ref_room = _rooms(hidden, ref_hidden, vocabulary)
        for rows, columns in _tiles(len(hidden), vocabulary):
            slab = room.product(hidden[rows], weight[columns])
            ref = ref_room.product(ref_hidden[rows], ref_weight[columns]) if ref_hidden is not None else None
            for block in _blocks(rows, slab):
                local = slice(block.start - rows.start, block.stop - rows.start)
                z = _exact(slab[local], exact, vocabulary, copy=keep)
                r = _exact(ref[local], exact, vocabulary) if ref is not None else None
                known_target = target[block] if target is not None else None
                part = vocabulary.blocks.statistics(z, r, labels[block] - columns.start, known_target, term, **vocabulary.raw)
                stats[:, block] = merge(torch.stack((stats[:, block], part)), term)
            kept = slab if keep else None
        if vocabulary.group is not None:
            parts = stats.new_empty(vocabulary.group.size() * len(stats), stats.shape[1])
            dist.all_gather_into_tensor(parts, stats, group=vocabulary.group)
            stats = merge(parts.view(-1, *stats.shape), term)
        known, logprobs, entropy, value = finish(stats, term)
        ctx.vocabulary = vocabulary
        ctx.save_for_backward(hidden, weight, labels, ref_hidden, ref_weight, kept, *known.tensors())
        ctx.set_materialize_grads(False)
        if not vocabulary.entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy, value

    @staticmethod
    @span("head_backward")
    def backward(ctx, grad_logprobs, grad_entropy, grad_term):
        hidden, weight, labels, ref_hidden, ref_weight, kept, *known = ctx.saved_tensors
        vocabulary, known = ctx.vocabulary, Known(*known)
        exact = known.top.dtype
        grads = [None if g is None else g / vocabulary.temperature for g in (grad_logprobs, grad_entropy, grad_term)]
        grad_hidden = torch.zeros_like(hidden, dtype=exact)
        of_weight = gradient_of(weight, vocabulary.columns) if ctx.needs_input_grad[1] else None
        room, ref_room = _rooms(hidden if kept is None else None, ref_hidden, vocabulary)
        for rows, columns in _tiles(len(hidden), vocabulary):
            slab = kept if kept is not None else room.product(hidden[rows], weight[columns])
            ref = ref_room.product(ref_hidden[rows], ref_weight[columns]) if ref_hidden is not None else None
            for block in _blocks(rows, slab):
                local = slice(block.start - rows.start, block.stop - rows.start)
                z = _exact(slab[local], exact, vocabulary)
                r = _exact(ref[local], exact, vocabulary) if ref is not None else None
                part = Known(*(None if k is None else k[block] for k in known.tensors()))
                wanted = Wanted(*(None if g is None else g[block] for g in grads))
                at = labels[block] - columns.start
                done = vocabulary.blocks.gradient(z, r, at, part, wanted, vocabulary.term, **vocabulary.raw)
                if done.data_ptr() != slab[local].data_ptr():
                    slab[local] = done
            accumulate(grad_hidden[rows], slab, weight[columns])
            if of_weight is not None:
                of_weight.add(slab, hidden, rows, columns, exact)
        return grad_hidden.to(hidden.dtype), None if of_weight is None else of_weight.finish(), None, None, None, None


def _fits(hidden: Tensor, vocabulary: Vocabulary) -> bool:
    """Whether one slab holds all logits: then they can stay, and the backward pass need not make them again."""
    return vocabulary.columns > 0 and _tile(len(hidden), vocabulary) == (len(hidden), vocabulary.columns)


def _tile(tokens: int, vocabulary: Vocabulary) -> tuple[int, int]:
    """Tokens and columns of a slab: all tokens where they leave it 64 columns or more; columns by 64, which products like."""
    elements = max(1, vocabulary.chunk_bytes // 4)
    most = max(MOST_TOKENS, elements // WIDE)
    height = max(1, min(tokens, most, elements // min(64, max(1, vocabulary.columns))))
    width = elements // height
    if width >= vocabulary.columns:
        return height, max(1, vocabulary.columns)
    return height, max(1, width // 64 * 64 or width)


def _tiles(tokens: int, vocabulary: Vocabulary) -> Iterator[tuple[slice, slice]]:
    """(tokens, columns) of each slab: all tokens of some columns, then of the next, so sums over tokens are of few columns."""
    height, width = _tile(tokens, vocabulary)
    for column in range(0, vocabulary.columns, width):
        for start in range(0, tokens, height):
            yield slice(start, min(start + height, tokens)), slice(column, min(column + width, vocabulary.columns))


def _blocks(rows: slice, slab: Tensor) -> Iterator[slice]:
    """The rows of a slab, a few at a time; on a GPU, which has no such cache, all at once."""
    height = max(1, BLOCK_BYTES // (4 * slab.shape[1])) if slab.device.type == "cpu" else len(slab)
    for start in range(rows.start, rows.stop, height):
        yield slice(start, min(start + height, rows.stop))


class _Room:
    """The memory of one slab, in which all of them lie, one after the other: fresh memory costs its first touch each time."""

    def __init__(self, like: Tensor, vocabulary: Vocabulary):
        height, width = _tile(len(like), vocabulary)
        self.memory = like.new_empty(height * width)

    def product(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """[n, columns] logits, without the temperature."""
        shape = len(hidden), len(weight)
        return torch.mm(hidden, weight.T, out=self.memory[: shape[0] * shape[1]].view(shape))


def _rooms(hidden: Tensor | None, ref_hidden: Tensor | None, vocabulary: Vocabulary) -> tuple[_Room | None, ...]:
    return tuple(None if like is None else _Room(like, vocabulary) for like in (hidden, ref_hidden))


def _exact(logits: Tensor, dtype: torch.dtype, vocabulary: Vocabulary, copy: bool = False) -> Tensor:
    """In fp32 (fp64), temperature applied; in their own place where they have that dtype, unless `copy`. Raw as they are."""
    if vocabulary.raw:
        return logits
    logits = logits.to(dtype, copy=copy)
    return logits if vocabulary.temperature == 1 else logits.div_(vocabulary.temperature)


def _targets(hidden: Tensor, weight: Tensor, labels: Tensor, vocabulary: Vocabulary, exact: torch.dtype) -> Tensor:
    """[T] z of the labels, before anything else is known."""
    mine = (labels >= 0) & (labels < vocabulary.columns)
    rows = weight[labels.clamp(0, max(0, vocabulary.columns - 1))]
    target = torch.where(mine, (hidden.to(exact) * rows.to(exact)).sum(-1) / vocabulary.temperature, 0)
    if vocabulary.group is not None:
        dist.all_reduce(target, group=vocabulary.group)  # zero everywhere but on one rank: exact
    return target


__all__ = ["Slabs", "Vocabulary"]
