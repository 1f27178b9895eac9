"""How much memory a run takes of the rank that takes most, and how it is given back."""

from __future__ import annotations

import gc
import resource
import sys

import torch
import torch.distributed as dist

from megapsft.platform.cpu import has_cuda


def most_memory() -> int:
    """Bytes that this process has held at most: on a GPU those that torch allocated there, else those that were resident."""
    if has_cuda():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_of_fullest_rank(device: torch.device) -> int:
    """Collective. The most of all ranks, the same on each.

    Args:
        device: that the process group's backend works on.
    """
    found = torch.tensor(most_memory(), dtype=torch.int64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found.item())


def free_models() -> None:
    """Give back the memory of models that were let go: Megatron's wrappers hold themselves in cycles."""
    gc.collect()
    if has_cuda():
        torch.cuda.empty_cache()
