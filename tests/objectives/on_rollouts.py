"""An objective on rollouts, from bare numbers."""

from __future__ import annotations

import torch

from megapsft.types import PolicyOutput
from tests.oracles.batches import update_batch

LOGPROBS = [-0.2, -1.1, -0.05]
OLD_LOGPROBS = [-0.35, -1.0, -0.6]  # ratios 1.1618, 0.9048, 1.7333


def evaluate(objective, logprobs, old_logprobs, advantages, mask=None, **fields):
    """(losses, gradient of their plain sum, metrics [B, S], loss) of an update of one row a sample, all of it trained.

    Numbers are [S], of one sample, or [B, S]; advantages may also be one number.
    """
    logprobs = torch.atleast_2d(torch.tensor(logprobs)).requires_grad_()
    shape = logprobs.shape
    mask = torch.ones(shape, dtype=torch.bool) if mask is None else torch.tensor(mask)
    fields = {key: torch.atleast_2d(torch.tensor(value)).expand(shape) for key, value in fields.items()}
    fields |= {"old_logprobs": torch.tensor(old_logprobs).expand(shape), "advantages": torch.tensor(advantages).expand(shape)}
    batch = update_batch(objective, mask, torch.float32, **fields)
    losses, metrics = objective(PolicyOutput(logprobs=logprobs, entropy=torch.zeros(shape)), batch)
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    loss = (batch.loss_weights * losses.detach()).sum()
    return losses.detach(), gradient, {key: metric.values for key, metric in metrics.items()}, loss.item()


def close(actual, expected):
    """To the four decimals of the docstrings."""
    torch.testing.assert_close(actual, torch.atleast_2d(torch.tensor(expected)), atol=5e-5, rtol=0)
