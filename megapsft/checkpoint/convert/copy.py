"""The one loop of all conversions: windows of rows from Weights to a Target, hashed and looked through on their way."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megapsft.checkpoint.convert import memory
from megapsft.checkpoint.convert.journal import Done, Journal
from megapsft.checkpoint.convert.target import Target
from megapsft.checkpoint.convert.workers import Options, Progress, each, read_rows, windows
from megapsft.checkpoint.files.direct import Buffers, as_bytes
from megapsft.checkpoint.weights import Weights
from megapsft.checkpoint.weights.hashed import Hashed
from megapsft.errors import Refused

BLOCK = 2**20  # bytes that are hashed and looked through while the cache holds them
# windows that a worker holds: its own, the pages that are read, columns; more where numbers change on the way
PLAIN, CHANGED = 3, 10
NOT_FINITE = {  # dtype -> (bits as integers, the least pattern without sign that is infinite or not a number)
    torch.float64: (np.uint64, 0x7FF0 << 48),
    torch.float32: (np.uint32, 0x7F80 << 16),
    torch.bfloat16: (np.uint16, 0x7F80),
    torch.float16: (np.uint16, 0x7C00),
    torch.float8_e4m3fn: (np.uint8, 0x7F),
}


def copy(weights: Weights, sources: Hashed, target: Target, journal: Journal, text: str, options: Options) -> None:
    """Every tensor of the target that the journal does not have yet.

    Args:
        weights: what is written.
        sources: what they read, or the same; its hashes are noted along with those of what is written.
        text: beside the progress bar.

    Raises:
        Refused: by a read or a write; the memory does not allow one worker.
    """
    same = weights is sources
    source = sources.unhashed if same else weights  # hashing once is enough
    left = {name: stored for name, stored in target.tensors.items() if name not in journal.done}
    before = sum(target.tensors[name].nbytes for name in journal.done)

    def work(name: str, window: int, buffers: Buffers, progress: Progress) -> None:
        digest, nonfinite = hashlib.sha256(), 0
        for start, stop in windows(left[name], window):
            content = as_bytes(read_rows(source, name, start, stop, buffers))
            nonfinite += inspect(content, left[name].dtype, digest)
            target.write(name, start, content)
            progress(len(content))
        read = {name: digest.hexdigest()} if same else sources.of(name)
        journal.add(name, Done(digest.hexdigest(), nonfinite, read))

    each(work, left, PLAIN if same else CHANGED, text, options, before)
    journal.flush()


def check_memory(weights: Weights, sources: Hashed, target: Target, options: Options) -> None:
    """That `copy` will have the memory it needs. Raises Refused."""
    largest = max(stored.row_bytes for stored in target.tensors.values())
    memory.plan(options.max_memory, options.workers, PLAIN if weights is sources else CHANGED, largest)


def read_back(weights: Weights, done: dict[str, Done], options: Options) -> None:
    """Read all of what was just written.

    Raises:
        Refused: it is something else; the disk, or the memory, is not to be trusted.
    """

    def work(name: str, window: int, buffers: Buffers, progress: Progress) -> None:
        digest = hashlib.sha256()
        for start, stop in windows(weights.tensors[name], window):
            content = as_bytes(read_rows(weights, name, start, stop, buffers))
            digest.update(content.numpy())
            progress(len(content))
        if digest.hexdigest() != done[name].sha256:
            rule = "is not what was written a moment ago"
            raise Refused(name, rule, "trust neither this disk nor this memory; convert on another machine")

    each(work, {name: weights.tensors[name] for name in done}, PLAIN, "read back", options)


def inspect(content: Tensor, dtype: torch.dtype, digest: Any) -> int:
    """Hash bytes, and count the numbers in them that are infinite or not a number."""
    bits, least = NOT_FINITE[dtype]
    width = np.dtype(bits).itemsize
    sign = 1 << (8 * width - 1)
    raw, count = content.numpy(), 0
    for start in range(0, len(raw), BLOCK):
        block = raw[start : start + BLOCK]
        digest.update(block)
        numbers = block.view(bits)
        # two looks at the largest tell for nearly all blocks that there is none
        if block.view(f"i{width}").max() >= least or numbers.max() >= least + sign:
            count += int(((numbers & (sign - 1)) >= least).sum())
    return count
