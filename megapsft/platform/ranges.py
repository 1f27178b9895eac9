"""Named ranges in a profile: of torch's profiler and, on CUDA, of NVTX for Nsight Systems. Nothing while no profile is taken."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from megapsft.platform.cpu import has_cuda

_taken = False  # of all threads: on CUDA torch runs backward passes in others


def mark_ranges(taken: bool) -> None:
    """Whether a profile is being taken from now on."""
    global _taken
    _taken = taken


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """The body as a range. It changes nothing of what is computed."""
    if not _taken:
        yield
        return
    import torch

    with torch.profiler.record_function(name), torch.cuda.nvtx.range(name) if has_cuda() else contextlib.nullcontext():
        yield


__all__ = ["mark_ranges", "span"]
