"""Adam with the state layout of Transformer Engine's FusedAdam (`step` in the parameter group), in plain torch.

Megatron's distributed optimizer saves and loads that layout; with torch's own AdamW its checkpoints cannot be loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101, Algorithm 2); plain Adam with L2 where `adam_w_mode` is False.

    Parameters (Megatron's main parameters) and moments are fp32. `_foreach_` kernels: one call for all parameters of a group.
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
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, bias_correction=bias_correction)
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not group["params"]:
                continue
            group["step"] = step = group.get("step", 0) + 1
            if not params:
                continue
            beta1, beta2 = group["betas"]
            correction1, correction2 = (1 - beta1**step, 1 - beta2**step) if group["bias_correction"] else (1.0, 1.0)
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
            first = [self.state[p]["exp_avg"] for p in params]
            second = [self.state[p]["exp_avg_sq"] for p in params]
            grads = [p.grad.to(p.dtype) for p in params]
            if self.adam_w_mode:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            else:
                grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
            torch._foreach_lerp_(first, grads, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, grads, grads, value=1 - beta2)
            denominator = torch._foreach_sqrt(second)
            torch._foreach_div_(denominator, correction2**0.5)
            torch._foreach_add_(denominator, group["eps"])
            torch._foreach_addcdiv_(params, first, denominator, value=-group["lr"] / correction1)
