"""`statistics` and `gradient` of head/statistics.py as two fused kernels in Triton.

They read the logits as the product left them (bf16, fp16 or fp32, once each) and apply the temperature in registers, so no fp32
copy of a slab exists; the gradient goes into the slab's own place and dtype. All arithmetic is fp32; fp64 logits are handed to
head/statistics.py. Products are cuBLAS's, never `tl.dot`. One program has one row of the statistics, and adds in an order that
depends on the columns alone: the same slab gives the same bits.

On a CPU the kernels run in Triton's interpreter, where TRITON_INTERPRET=1 is set before triton is imported: for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapsft.policy.head import statistics as plain
from megapsft.policy.head.statistics import Known, Wanted
from megapsft.types import VocabularyTerm

RAW_LOGITS = True  # what head/chunked.py asks: hand over the slab itself, and the temperature
INTERPRETED = not isinstance(tl.sigmoid, triton.JITFunction)  # whether TRITON_INTERPRET=1 was set when triton was imported
BLOCK = 2048  # columns at a time
WARPS = 8
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # not -inf: -inf - -inf and 0 * -inf are nan
SLOPE = tl.constexpr(plain.SLOPE)


def statistics(
    z: Tensor, ref: Tensor | None, labels: Tensor, known_target: Tensor | None, term: VocabularyTerm | None,
    temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """[channels, n] fp32 (fp64 for fp64 logits) of one part of the vocabulary, in the order of `statistics.channels`.

    Args:
        z: [n, columns] logits of these columns, before the temperature; of any dtype and strides; left as they are.
        ref: [n, columns] of the reference, likewise.
        labels: [n] int64, columns of the labels; out of range where the label lies elsewhere.
        known_target: [n] the label's z, temperature applied, where GEM's h needs it.
        temperature: divides z and ref.
    """
    if z.dtype == torch.float64:
        ref = None if ref is None else ref / temperature
        return plain.statistics(z / temperature, ref, labels, known_target, term)
    stats = torch.empty(len(plain.channels(term)), len(z), dtype=torch.float32, device=z.device)
    if len(z):
        _statistics[(len(z),)](
            stats, z, ref, *_contiguous(labels, known_target), len(z), *_numbers(z, ref, term, temperature),
            **_switches(term), BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return stats


def gradient(
    z: Tensor, ref: Tensor | None, labels: Tensor, known: Known, wanted: Wanted, term: VocabularyTerm | None,
    temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """[n, columns] gradient in these logits, of the dtype of z and in its place.

    Args: as of `statistics`; `known` and `wanted` of the same n tokens, fp32.
    """
    if z.dtype == torch.float64:
        ref = None if ref is None else ref / temperature
        return plain.gradient(z.div_(temperature), ref, labels, known, wanted, term)
    if z.numel():
        vectors = _contiguous(labels, *known.tensors(), wanted.logprobs, wanted.entropy, wanted.term)
        _gradient[(len(z), -(-z.shape[1] // BLOCK))](
            z, ref, *vectors, *_numbers(z, ref, term, temperature), **_switches(term), BLOCK=BLOCK, num_warps=WARPS
        )
        torch.autograd.graph.increment_version(z)  # as in-place operations do: who saved it is not to read it again
    return z


def _contiguous(*of_tokens: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.contiguous() for x in of_tokens)


def _numbers(z: Tensor, ref: Tensor | None, term: VocabularyTerm | None, temperature: float) -> tuple[int | float, ...]:
    """columns, strides of z and ref, 1 / temperature, 1 / beta."""
    sharpness = 1 / term.beta if term is not None and term.kind == "gem" else 1.0
    return z.shape[1], *z.stride(), *((0, 0) if ref is None else ref.stride()), 1 / temperature, sharpness


def _switches(term: VocabularyTerm | None) -> dict[str, str | bool]:
    return {"KIND": "none" if term is None else term.kind, "SIGMOID": term is not None and term.h == "logsigmoid"}


@triton.jit
def _row(part, row, column_stride, row_stride, column, inside, scale):
    """Some columns of a row in fp32, temperature applied; LOWEST beyond the last column."""
    place = part + row * row_stride + column.to(tl.int64) * column_stride  # a slab may have more than 2^31 logits
    return tl.where(inside, tl.load(place, mask=inside, other=0.0).to(tl.float32) * scale, LOWEST)


@triton.jit
def _statistics(
    stats, part, ref, labels, known_target, tokens,
    columns, row_stride, column_stride, ref_row_stride, ref_column_stride, scale, sharpness,
    KIND: tl.constexpr, SIGMOID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: a running maximum, and sums of each lane relative to it, which are added at the end."""
    KL: tl.constexpr = KIND == "reverse_kl" or KIND == "forward_kl"
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    lane = tl.arange(0, BLOCK)
    top = tl.full((), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    if KL:
        ref_top = tl.full((), LOWEST, tl.float32)
        ref_total = tl.zeros((BLOCK,), tl.float32)
        ref_weighted = tl.zeros((BLOCK,), tl.float32)
        crossed = tl.zeros((BLOCK,), tl.float32)
    if KIND == "gem":
        q_total = tl.zeros((BLOCK,), tl.float32)
        q_h = tl.zeros((BLOCK,), tl.float32)
        q_hx = tl.zeros((BLOCK,), tl.float32)
    if SIGMOID:
        target_z = tl.load(known_target + row)
    for start in range(0, columns, BLOCK):
        column = start + lane
        inside = column < columns
        z = _row(part, row, column_stride, row_stride, column, inside, scale)
        new_top = tl.maximum(top, tl.max(z, 0))
        move = top - new_top  # of what is held relative to the maximum
        shrink = tl.exp(move)
        x = z - new_top
        p = tl.exp(x)
        if KL:
            r = _row(ref, row, ref_column_stride, ref_row_stride, column, inside, scale)
            new_ref_top = tl.maximum(ref_top, tl.max(r, 0))
            ref_move = ref_top - new_ref_top
            ref_shrink = tl.exp(ref_move)
            y = r - new_ref_top
            q = tl.exp(y)
            if KIND == "reverse_kl":
                crossed = (crossed + ref_move * total) * shrink + p * y
            else:
                ref_weighted = (ref_weighted + ref_move * ref_total) * ref_shrink + q * y
                crossed = (crossed + move * ref_total) * ref_shrink + q * x
            ref_total = ref_total * ref_shrink + q
            ref_top = new_ref_top
        if KIND == "gem":
            q_shrink = tl.exp(move * sharpness)
            q = tl.exp(x * sharpness)
            q_total = q_total * q_shrink + q
            if SIGMOID:
                q *= tl.sigmoid(SLOPE * (z - target_z))
            q_hx = (q_hx + move * q_h) * q_shrink + q * x
            q_h = q_h * q_shrink + q
        weighted = (weighted + move * total) * shrink + p * x
        total = total * shrink + p
        top = new_top
    mine = (label >= 0) & (label < columns)
    place = part + row * row_stride + label * column_stride
    stats += row
    tl.store(stats, top)
    tl.store(stats + tokens, tl.sum(total, 0))
    tl.store(stats + 2 * tokens, tl.sum(weighted, 0))
    tl.store(stats + 3 * tokens, tl.load(place, mask=mine, other=0.0).to(tl.float32) * scale)
    if KL:
        tl.store(stats + 4 * tokens, ref_top)
        tl.store(stats + 5 * tokens, tl.sum(ref_total, 0))
    if KIND == "reverse_kl":
        tl.store(stats + 6 * tokens, tl.sum(crossed, 0))
    if KIND == "forward_kl":
        tl.store(stats + 6 * tokens, tl.sum(ref_weighted, 0))
        tl.store(stats + 7 * tokens, tl.sum(crossed, 0))
    if KIND == "gem":
        tl.store(stats + 4 * tokens, tl.sum(q_total, 0))
        tl.store(stats + 5 * tokens, tl.sum(q_h, 0))
        tl.store(stats + 6 * tokens, tl.sum(q_hx, 0))


@triton.jit
def _gradient(
    part, ref, labels, known_top, known_total, mean, target, known_ref_top, other_total, level, of_logprobs, of_entropy, of_term,
    columns, row_stride, column_stride, ref_row_stride, ref_column_stride, scale, sharpness,
    KIND: tl.constexpr, SIGMOID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one row: p (constant + slopes) + extra, and at_label where the label is."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    x = _row(part, row, column_stride, row_stride, column, inside, scale) - tl.load(known_top + row)
    factor = tl.zeros((BLOCK,), tl.float32)
    extra = tl.zeros((BLOCK,), tl.float32)
    at_label = tl.zeros((), tl.float32)
    if of_logprobs is not None:
        at_label = tl.load(of_logprobs + row)
        factor -= at_label
    if of_entropy is not None:
        factor -= tl.load(of_entropy + row) * (x - tl.load(mean + row))
    if of_term is not None:
        weight = tl.load(of_term + row)
        if KIND == "gem":
            extra = tl.exp(x * sharpness) * (weight / tl.load(other_total + row))
            if SIGMOID:
                extra *= tl.sigmoid(SLOPE * (x - tl.load(target + row)))
            at_label -= weight * tl.load(level + row)
        else:
            y = _row(ref, row, ref_column_stride, ref_row_stride, column, inside, scale) - tl.load(known_ref_top + row)
            if KIND == "reverse_kl":
                factor += weight * (x - y - tl.load(level + row))
            else:
                factor += weight
                extra = -tl.exp(y) * (weight / tl.load(other_total + row))
    found = factor * (tl.exp(x) / tl.load(known_total + row)) + extra
    found += tl.where(column == label, at_label, 0.0)
    place = part + row * row_stride + column.to(tl.int64) * column_stride
    tl.store(place, found.to(part.dtype.element_ty), mask=inside)
