"""Adam with the state layout of Transformer Engine's FusedAdam (`step` in the parameter group), in plain torch.

Megatron's distributed optimizer saves and loads that layout; with torch's own AdamW its checkpoints cannot be loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw


class FusedAdam(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101, Algorithm 2); plain Adam with L2 where `adam_w_mode` is False.

    Parameters (Megatron's main parameters) and moments are fp32. The arithmetic is torch's own fused kernel.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        **not_for_cpu: Any,  # TE's switches of precision and fusion
    ):
        if not bias_correction:
            raise ValueError("bias_correction=False: Megatron never asks for it, and torch's kernel has none")
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch's own, below the decorator that keeps its compiler out, and for that imports it: a second of every start."""
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not group["params"]:
                continue
            group["step"] = step = group.get("step", 0) + 1
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
            beta1, beta2 = group["betas"]
            (adamw if self.adam_w_mode else adam)(
                params,
                [p.grad.to(p.dtype) for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [torch.tensor(float(step - 1)) for _ in params],  # torch counts this step itself
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
