"""Differences between the supported Megatron-Core versions, 0.16.1 (Python 3.11) to 0.19 (Python 3.12): all of them are here."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from megapsft.platform.cpu import has_cuda


def have_transformer_engine() -> bool:
    """Whether layers come from Transformer Engine: it is installed and there is a CUDA device for it."""
    if not has_cuda():
        return False
    from megatron.core.extensions import transformer_engine

    return bool(transformer_engine.HAVE_TE)


def hush() -> None:
    """Silence what Megatron and torch warn about Megatron's own use of old names: no news for a user, once a rank a call."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*load_state_dict. is deprecated")
    warnings.filterwarnings("ignore", message="full scope is deprecated|.*CUDA_DEVICE_MAX_CONNECTIONS")


def save_checkpoint(sharded_state_dict: dict, path: str, **options: Any) -> Any:
    """`dist_checkpointing.save`; returns the request to schedule where `async_sharded_save`.

    0.17 adds `async_strategy` with a default that needs another package; 'mcore' is the one that 0.16 has.
    """
    from megatron.core import dist_checkpointing

    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        options["async_strategy"] = "mcore"
    return dist_checkpointing.save(sharded_state_dict, path, **options)
