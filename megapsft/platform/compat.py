"""Differences between the supported Megatron-Core versions, 0.16.1 (Python 3.11) to 0.19 (Python 3.12): all of them are here."""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def fusions() -> dict[str, bool]:
    """Keyword arguments of TransformerConfig for the kernels of Transformer Engine that Megatron found in the version there is.

    Rotary embeddings of packed rows, without which each layer waits for the host; the permutation of tokens to their experts.
    """
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer.moe import moe_utils

    return dict(
        apply_rope_fusion=getattr(rope_utils, "fused_apply_rotary_pos_emb_thd", None) is not None,
        moe_permute_fusion=getattr(moe_utils, "fused_permute_with_probs", None) is not None,
    )


def hush() -> None:
    """Silence what Megatron and torch warn about old names, Megatron's own use of them and its plans: no news for a user."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*load_state_dict. is deprecated")
    warnings.filterwarnings("ignore", message="full scope is deprecated|.*CUDA_DEVICE_MAX_CONNECTIONS")
    for module in ("models.gpt.gpt_model", "dist_checkpointing.strategies.torch"):  # of 0.19: GPTModel, its own async saves
        logging.getLogger(f"megatron.core.{module}").addFilter(_not_deprecated)


def _not_deprecated(record: logging.LogRecord) -> bool:
    return "is deprecated" not in record.getMessage().lower()


def save_experts_without_states() -> None:
    """Let Megatron before 0.19 take apart the state of experts' layers that have none.

    Transformer Engine 2.18 and newer keep one of FP8's delayed recipe alone; Megatron looks for each expert's in it whatever the
    recipe, and no checkpoint can be saved. Does nothing the second time.
    """
    from megatron.core.extensions.transformer_engine import TEGroupedLinear

    split = TEGroupedLinear._split_extra_state
    if split.__module__ == __name__:
        return

    def split_if_any(layer: Any, state: Any) -> list[Any]:
        return split(layer, state) if state.numel() else [state] * layer.num_gemms

    TEGroupedLinear._split_extra_state = split_if_any


def finish_fp8_weights(chunk: Any) -> None:
    """What is due once FP8 weights are gathered: the transposed copies that a backward pass multiplies with, made of their bytes.

    Before 0.18 Megatron leaves it out where gathering overlaps and is forced, and the copies stay those of the weights before.
    A second time it changes nothing.
    """
    from megatron.core.fp8_utils import is_float8tensor, post_all_gather_processing

    weights = [parameter for parameter in chunk.parameters() if is_float8tensor(parameter)]
    if weights:
        post_all_gather_processing(weights)


@contextmanager
def transformer_engine_states() -> Iterator[None]:
    """Let Transformer Engine (2.17 and newer) unpickle states of its layers inside of the context: what holds nothing harmful."""
    name = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def save_checkpoint(sharded_state_dict: dict, path: str, **options: Any) -> Any:
    """`dist_checkpointing.save`; returns the request to schedule where `async_sharded_save`.

    0.17 adds `async_strategy` with a default that needs another package; 'mcore' is the one that 0.16 has.
    """
    from megatron.core import dist_checkpointing

    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        options["async_strategy"] = "mcore"
    return dist_checkpointing.save(sharded_state_dict, path, **options)
