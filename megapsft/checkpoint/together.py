"""What one rank finds out, and all must act on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megapsft.errors import Refused


def refuse_together(check: Callable[[], None]) -> None:
    """Collective where torch.distributed runs. Do `check` on rank 0, and let what it refuses be raised on every rank."""
    from_first(check)


def from_first(find: Callable[[], Any], otherwise: Callable[[], Any] | None = None) -> Any:
    """Collective where torch.distributed runs. What `find` gives on rank 0, on every rank; what it raises there, everywhere.

    Args:
        otherwise: what the other ranks do meanwhile.
    """
    found: list[Any] = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            found[0] = find()
        except (Refused, RuntimeError, OSError) as error:  # those that can be sent, and that others can act on
            found[1] = error
    elif otherwise is not None:
        otherwise()
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise found[1]
    return found[0]
