"""How much memory a conversion may take, and what windows of rows that leaves room for."""

from __future__ import annotations

import os
import re
import resource
import sys
from typing import NamedTuple

from megapsft.checkpoint.files.direct import PAGE, page_floor
from megapsft.errors import Refused

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
DEFAULT, ROOM = 600 * 2**20, 256 * 2**20  # bytes
RESERVE = 48 * 2**20  # that Python, the journal and the file system's requests take meanwhile
BLOCK = 128  # rows
LARGEST, SMALLEST = 16 * 2**20, 2**18  # windows: larger ones are no faster, smaller ones much slower


class Budget(NamedTuple):
    """What the memory allows."""

    workers: int
    window: int  # bytes of rows that a worker has in its hands at once


def parse_size(text: str) -> int:
    """Bytes in a text such as 600MiB, 5GB or 1000000.

    Raises:
        Refused: it is not a size.
    """
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*((?:[KMGT]I?)?)B?\s*", text.upper(), re.ASCII)
    size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if size < 1:
        raise Refused(f"size {text!r}", "is not a number of bytes", "write for example 600MiB or 5GB")
    return size


def plan(max_memory: int | None, workers: int, copies: int, largest_row: int) -> Budget:
    """Windows such that the process stays below `max_memory` bytes.

    Args:
        max_memory: None for DEFAULT, or in a process that has most of that already, for ROOM beyond what it has.
        workers: threads that are wished for; fewer where the memory does not allow as many.
        copies: windows that a worker holds at once, whatever it does to them.
        largest_row: bytes of the largest row of any tensor; a window has one row at least.

    Raises:
        Refused: not even one worker has room.
    """
    if workers < 1:
        raise Refused(f"workers={workers}", "must be 1 or more", "use 4")
    if max_memory is None:
        max_memory = max(DEFAULT, resident() + ROOM)
    free = max_memory - resident() - RESERVE
    least = max(SMALLEST, largest_row)
    while workers > 1 and free // (workers * copies) < least:
        workers -= 1
    window = min(LARGEST, free // (workers * copies))
    if window < least and free // copies < least:
        needed = (max_memory - free + copies * least) / 2**20
        rule = f"is not enough: this conversion needs {needed:.0f}MiB at least, most of it for torch itself"
        raise Refused(f"max_memory={max_memory / 2**20:.0f}MiB", rule, f"use --max-memory {needed * 1.1:.0f}MiB or more")
    return Budget(workers, max(least, page_floor(window)))


def rows_per_window(window: int, row_bytes: int) -> int:
    """Rows of at most `window` bytes; where there are enough, whole blocks of FP8 scales and whole pages of the file."""
    rows = max(1, window // max(1, row_bytes))
    pages = PAGE // min(PAGE, row_bytes & -row_bytes or PAGE)
    for step in (max(BLOCK, pages), pages):  # both are powers of two
        if rows >= step:
            return rows // step * step
    return rows


def resident() -> int:
    """Bytes of memory that this process has now; on systems without /proc, the most that it had."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
