"""Parameters that the distributed optimizer updates in shards, whole again on every rank, now."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megapsft.platform.compat import finish_fp8_weights


def gather(chunks: Sequence[torch.nn.Module]) -> None:
    """Collective. Gather what each rank has of the parameters, and wait for it.

    Args:
        chunks: wrapped in DistributedDataParallel, under the distributed optimizer.
    """
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)
        if chunk.ddp_config.overlap_param_gather:
            finish_fp8_weights(chunk)


def gather_stale(chunks: Sequence[torch.nn.Module]) -> None:
    """Collective. `gather` where gathering overlaps with the next forward pass, before which parameters are stale."""
    gather([chunk for chunk in chunks if chunk.ddp_config.overlap_param_gather])
