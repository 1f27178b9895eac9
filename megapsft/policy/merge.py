"""Several packed microbatches as one, for passes without gradient, which have room for more: fewer and larger kernels.

The numbers are those of the single microbatches but for rounding, which is no longer the same: the noise floor of
`megapsft probe` shows how much that matters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from megapsft.types import Microbatch, Minibatch


def merge(minibatch: Minibatch, at_once: int, multiple: int) -> tuple[Minibatch, int]:
    """The minibatch in fewer microbatches, and how many became one.

    Args:
        at_once: at most so many become one; as many as divide the number of microbatches, so that all stay alike.
        multiple: the number of microbatches has to stay a multiple of this (interleaved pipelines).
    """
    count = len(minibatch.microbatches)
    fitting = [k for k in range(1, min(at_once, count) + 1) if count % k == 0 and count // k % multiple == 0]
    size = max(fitting, default=1)
    if size == 1 or minibatch.microbatches[0].cu_seqlens is None:
        return minibatch, 1
    starts = range(0, count, size)
    merged = tuple(concatenate(minibatch.microbatches[start : start + size]) for start in starts)
    return dataclasses.replace(minibatch, microbatches=merged), size


def concatenate(parts: Sequence[Microbatch]) -> Microbatch:
    """One pack that holds the packs end to end: [1, sum of S] each."""
    tensors = {
        field.name: torch.cat([getattr(part, field.name) for part in parts], dim=1)
        for field in dataclasses.fields(Microbatch)
        if isinstance(getattr(parts[0], field.name), Tensor) and field.name not in ("cu_seqlens", "ref_hidden")
    }
    borders, start = [parts[0].cu_seqlens[:1]], 0
    for part in parts:
        borders.append(part.cu_seqlens[1:] + start)
        start += int(part.cu_seqlens[-1])
    tensors["cu_seqlens"] = torch.cat(borders)
    return dataclasses.replace(parts[0], **tensors, max_seqlen=max(part.max_seqlen for part in parts), ref_hidden=None)


def split(outputs: Sequence[Tensor], minibatch: Minibatch, size: int) -> list[Tensor]:
    """What the merged microbatches gave, [1, sum of S, C], as [1, S, C] for each of `minibatch`."""
    if size == 1:
        return list(outputs)
    lengths = [microbatch.token_ids.shape[1] for microbatch in minibatch.microbatches]
    parts = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    return [piece for output, part in zip(outputs, parts, strict=False) for piece in output.split(part, dim=1)]
