"""What the output layer reads of the trained tokens: enough to know everything about their distributions, again and again."""

from __future__ import annotations

from torch import Tensor

from megapsft.policy.build import Policy
from megapsft.policy.forward import Head, evaluate
from megapsft.types import Minibatch


def trained_hidden(policy: Policy, minibatch: Minibatch) -> list[Tensor]:
    """Collective. [n, D] of the n trained tokens of each microbatch, in its order; without a gradient.

    The same on all tensor-parallel ranks; empty where the rank has no head.
    """
    outputs = evaluate(policy, minibatch, Head(hidden=True))
    found = []
    for output, microbatch in zip(outputs, minibatch.microbatches, strict=False):
        hidden = output.transpose(0, 1).to(policy.config.params_dtype).contiguous()  # [S, B, D]; Megatron hands out fp32
        whole = policy.head().whole(hidden).detach().transpose(0, 1)
        found.append(whole[microbatch.loss_mask.to(whole.device)])
    return found


__all__ = ["trained_hidden"]
