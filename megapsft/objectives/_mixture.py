"""What objectives over demonstrations and rollouts of the same prompts share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megapsft.errors import Refused
from megapsft.objectives._per_token import PerToken
from megapsft.types import Metric, Microbatch

LONGEST_RESPONSE = 8192  # of the scripts of LUFFY and HPT: the default of max_response_length where something divides by it


@dataclass(frozen=True, kw_only=True)
class Mixture(PerToken):
    """Base of the objectives that train a group's rollouts and its demonstration together.

    An entropy bonus is one more term of every trained token, -entropy_coef H_t, weighed as `aggregation` says.
    """

    max_response_length: int | None = None  # L_max, the constant that the Lmax aggregations divide by; None: 8192
    entropy_coef: float = 0.0  # of the entropy bonus; 0: none
    trains_on: ClassVar[frozenset[str]] = frozenset({"rollouts"})

    def __post_init__(self) -> None:
        if self.max_response_length is None and self.aggregation.endswith("Lmax"):
            object.__setattr__(self, "max_response_length", LONGEST_RESPONSE)
        super().__post_init__()
        if not self.entropy_coef >= 0:
            raise Refused(f"entropy_coef={self.entropy_coef}", "must be 0 or more", "the scripts use 0.001; 0 is no bonus")

    @property
    def entropy_gradient(self) -> bool:
        return self.entropy_coef > 0

    def with_bonus(self, loss: Tensor, entropy: Tensor, mask: Tensor) -> Tensor:
        """The losses [B, S] with the entropy bonus on every trained token."""
        return loss - self.entropy_coef * torch.where(mask, entropy, 0) if self.entropy_gradient else loss


def split(batch: Microbatch) -> tuple[Tensor, Tensor]:
    """([B, S] bool, the same): trained tokens of demonstrations, and of rollouts."""
    return batch.loss_mask & batch.demonstration, batch.loss_mask & ~batch.demonstration


def advantages_of(batch: Microbatch, dtype: torch.dtype) -> Tensor:
    """[B, S] constants, 0 where masked."""
    return torch.where(batch.loss_mask, batch.advantages.detach(), 0).to(dtype)


def as_mean(values: Tensor, where: Tensor, count: float, batch: Microbatch) -> Tensor:
    """What `values` must be so that, summed with the loss weights, they are their mean over the `count` tokens of `where`.

    Args:
        values: [B, S].
        where: [B, S] bool.
        count: tokens of `where` in the whole update, all ranks.
    """
    weights = torch.where(where, batch.loss_weights.detach(), 1).to(values.dtype)
    return torch.where(where, values / (max(1.0, count) * weights), 0)


def shaped(probability: Tensor, gamma: float | None) -> Tensor:
    """f(p) = p / (p + gamma), which has its steepest slope at small p; p itself where gamma is None."""
    return probability if gamma is None else probability / (probability + gamma)


def mean_over(values: Tensor, where: Tensor) -> Metric:
    """The mean of `values` over the tokens of `where`."""
    return Metric(values.detach(), "mean", where.to(values.dtype))


def part_of_loss(values: Tensor, batch: Microbatch) -> Metric:
    """What `values` [B, S] contribute to the loss of the update."""
    return Metric(values.detach(), "sum", torch.where(batch.loss_mask, batch.loss_weights, 0))
