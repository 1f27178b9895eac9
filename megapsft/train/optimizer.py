"""Megatron's AdamW: built, stepped with one finite and clipped gradient or not at all, and made to forget."""

from __future__ import annotations

import math

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megapsft.config import OptimizerConfig, ParallelConfig
from megapsft.policy.build import Policy


def build_optimizer(config: OptimizerConfig, parallel: ParallelConfig, policy: Policy) -> ChainedOptimizer:
    """AdamW over fp32 main parameters; biases and norms are not decayed (Megatron's rule); ZeRO-1 where configured."""
    options = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=policy.config.bf16,
        params_dtype=policy.config.params_dtype,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=bool(parallel.overlap_param_gather),
        fp8_recipe=policy.config.fp8_recipe if policy.config.fp8 else None,
    )
    optimizer = get_megatron_optimizer(options, policy.chunks)
    for group in optimizer.param_groups:  # Megatron leaves this to its scheduler, which we do not have
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
    return optimizer


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Of step 0 <= step < steps: linear warm-up to `lr`, then constant, or cosine or linear to `min_lr` at the last step."""
    if step < config.lr_warmup_steps:
        return config.lr * (step + 1) / config.lr_warmup_steps
    if config.lr_decay_style == "constant":
        return config.lr
    progress = (step - config.lr_warmup_steps) / max(1, steps - 1 - config.lr_warmup_steps)
    remaining = 1 - progress if config.lr_decay_style == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.min_lr + (config.lr - config.min_lr) * remaining


@torch.no_grad()
def step_if_finite(optimizer: ChainedOptimizer, lr: float) -> float:
    """Clip by the global norm and update, unless the norm is not finite: then nothing changes.

    Returns:
        The gradient's L2 norm over all ranks before clipping.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return norm
    for part in optimizer.chained_optimizers:
        parameters = [] if part.is_stub_optimizer else part.get_parameters()
        if parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=norm)
    optimizer.step_with_ready_grads()
    return norm


def forget(optimizer: ChainedOptimizer) -> None:
    """Drop moments and step count: a fresh optimizer over the same fp32 main parameters."""
    for part in optimizer.chained_optimizers:
        if not part.is_stub_optimizer:
            part.optimizer.state.clear()
            for group in part.optimizer.param_groups:
                group.pop("step", None)
