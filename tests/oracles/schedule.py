"""PSFT over several updates a step: the smallest model there is, a table of logits, trained by plain gradient descent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megapsft.errors import Refused
from megapsft.metrics.reduce import Reduction
from megapsft.objectives._per_token import PerToken
from megapsft.types import PolicyOutput
from tests.oracles.batches import update_batch


def evaluate_schedule(
    objective: PerToken,
    inputs: dict[str, Any],
    dtype: torch.dtype,
    *,
    train_batch: int,
    mini_batch: int,
    lr: float,
    optimizer: str,
    steps: int,
) -> dict[str, Any]:
    """Train `theta` [contexts, V] on `data`, pairs of a context and the token after it.

    A step takes the next `train_batch` pairs (round and round), computes their old log-probabilities once, and makes an
    update of every `mini_batch` of them, in order.
    """
    if optimizer != "sgd":
        raise Refused(f"optimizer={optimizer!r}", "is not known here", "use sgd")
    theta = torch.tensor(inputs["theta0"], dtype=dtype)
    data = torch.tensor(inputs["data"])
    log = []
    for step in range(steps):
        pairs = data[torch.arange(step * train_batch, (step + 1) * train_batch) % len(data)]
        old_logprobs, old_entropy = forward(theta, pairs)
        for mini, chosen in enumerate(torch.arange(train_batch).split(mini_batch)):
            theta.requires_grad_()
            logprobs, entropy = forward(theta, pairs[chosen])
            mask = torch.ones(logprobs.shape, dtype=torch.bool)
            batch = update_batch(objective, mask, dtype, old_logprobs=old_logprobs[chosen], old_entropy=old_entropy[chosen])
            losses, metrics = objective(PolicyOutput(logprobs=logprobs, entropy=entropy), batch)
            loss = (batch.loss_weights * losses).sum()
            (gradient,) = torch.autograd.grad(loss, theta)
            theta = (theta - lr * gradient).detach()

            reduction = Reduction(objective.metrics)
            reduction.add(metrics, mask)
            reduced = reduction.finish()
            log.append(
                {
                    "step": step,
                    "mini": mini,
                    "old_logprobs": old_logprobs[chosen].flatten().tolist(),
                    "logprobs": logprobs.flatten().tolist(),
                    "loss": loss.item(),
                    "clipfrac": reduced["objective/clip_fraction"],
                    "ratio_max": reduced["objective/ratio_max"],
                    "grad_l2": gradient.norm().item(),
                    "entropy_logged_at_step_start": old_entropy.mean().item(),
                }
            )
    return {"theta_final": theta.tolist(), "log": log}


def forward(theta: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of the token and entropy of each pair: [n, 1] each, every pair a sample of one token."""
    logprobs = theta[pairs[:, 0]].log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1, keepdim=True)
    return logprobs.gather(-1, pairs[:, 1:]), entropy.detach()
