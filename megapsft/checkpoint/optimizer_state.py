"""Optimizer state as tensors of the model's own shapes: the same file whatever split, or kind of Megatron optimizer, wrote it.

Keys are `optimizer.state.{param|exp_avg|exp_avg_sq}.<key of the parameter>`. Megatron's own format differs between the plain
and the distributed optimizer, and between runs with and without expert parallelism; this one is read by any of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from megapsft.policy.gather import gather

MOMENTS = ("exp_avg", "exp_avg_sq")


def sharded_state(optimizer: ChainedOptimizer, model_state: dict, is_loading: bool) -> dict[int, Any]:
    """What to save, or what to ask for: main parameters and moments as sharded tensors, by part of the chain."""
    state = {}
    for index, part in enumerate(optimizer.chained_optimizers):
        if part.is_stub_optimizer:
            continue
        _allocate(part.optimizer)
        if isinstance(part, DistributedOptimizer):
            state[index] = part.sharded_param_state_fully_reshardable(model_state, is_loading, {})
        else:
            state[index] = dict(enumerate(_plain_state(part, model_state)))
    return state


@torch.no_grad()
def load_state(optimizer: ChainedOptimizer, model_state: dict, loaded: dict[int, Any], step: int) -> None:
    """Put loaded tensors where this rank's optimizer keeps them, and the count of Adam's steps."""
    for index, part in enumerate(optimizer.chained_optimizers):
        if part.is_stub_optimizer:
            continue
        if isinstance(part, DistributedOptimizer):
            part.load_parameter_state_from_fully_reshardable(loaded[index])
        else:
            for position, (main, state, _) in enumerate(_parameters(part, model_state)):
                main.copy_(loaded[index][position]["param"])
                for name in MOMENTS:
                    state[name].copy_(loaded[index][position][name])
        for group in part.optimizer.param_groups:
            group["step"] = step


def round_again(optimizer: ChainedOptimizer, chunks: Sequence[torch.nn.Module]) -> None:
    """Collective. The model's parameters out of the main parameters, as a step of the distributed optimizer makes them.

    For those held in FP8: a checkpoint has them in bfloat16, and what is rounded a second time has other scales.
    """
    for part in optimizer.chained_optimizers:
        if not part.is_stub_optimizer:
            part._copy_main_params_to_model_params()
    gather(chunks)


def adam_step(optimizer: ChainedOptimizer) -> int:
    """Updates that the moments have seen."""
    steps = [g.get("step", 0) for part in optimizer.chained_optimizers if not part.is_stub_optimizer for g in part.param_groups]
    return int(max(steps, default=0))


def _allocate(inner: torch.optim.Optimizer) -> None:
    for group in inner.param_groups:
        for parameter in group["params"]:
            for name in MOMENTS:
                if name not in inner.state[parameter]:
                    inner.state[parameter][name] = torch.zeros_like(parameter, dtype=torch.float32)


def _plain_state(part: Any, model_state: dict) -> Iterator[dict[str, Any]]:
    for main, state, sharded in _parameters(part, model_state):
        tensors = {"param": main, **{name: state[name] for name in MOMENTS}}
        yield {name: _like(sharded, f"optimizer.state.{name}.{sharded.key}", tensor) for name, tensor in tensors.items()}


def _parameters(part: Any, model_state: dict) -> Iterator[tuple[Tensor, dict[str, Tensor], Any]]:
    """(fp32 main parameter, its moments, its sharded tensor in the model's state) in the model's order."""
    owned = {id(parameter): parameter for group in part.optimizer.param_groups for parameter in group["params"]}
    tensors, _ = extract_sharded_tensors_and_factories(model_state)
    for sharded in nested_values(tensors):
        main = getattr(sharded.data, "main_param", sharded.data)
        if id(main) in owned:
            yield main.data, part.optimizer.state[owned[id(main)]], sharded


def _like(sharded: Any, key: str, tensor: Tensor) -> Any:
    if isinstance(sharded, ShardedTensorFactory):
        return replace(sharded, key=key, data=tensor)
    return replace(sharded, key=key, data=tensor, dtype=tensor.dtype)
