"""What one rank finds out, and all must act on."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from megapsft.errors import Refused


def refuse_together(check: Callable[[], None]) -> None:
    """Collective where torch.distributed runs. Do `check` on rank 0, and let what it refuses be raised on every rank."""
    refusal: list[Refused | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            check()
        except Refused as error:
            refusal[0] = error
    if dist.is_initialized():
        dist.broadcast_object_list(refusal, src=0)
    if refusal[0] is not None:
        raise refusal[0]
