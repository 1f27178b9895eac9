"""The processes of a run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from megapsft.errors import Refused

if TYPE_CHECKING:
    from megapsft.config import ParallelConfig


def world_of(parallel: ParallelConfig, nproc_per_node: int | None) -> tuple[int, bool]:
    """How many processes there are or are to be, and whether this is one of them already."""
    from megapsft.parallel import smallest_world
    from megapsft.platform.launch import die_with_launcher, joined_world

    if nproc_per_node is not None and nproc_per_node < 1:
        raise Refused(f"--nproc-per-node {nproc_per_node}", "must be 1 or more", "leave it out for as many as the split needs")
    die_with_launcher()
    joined = joined_world()
    return joined or nproc_per_node or max(smallest_world(parallel), _gpus()), bool(joined)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def is_first() -> bool:
    """Whether this process is the one that reports."""
    return os.environ.get("RANK", "0") == "0"
