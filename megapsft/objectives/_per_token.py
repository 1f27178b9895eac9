"""What every objective over single tokens shares: how its losses are weighed, and what it says about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from megapsft.errors import Refused
from megapsft.types import Microbatch

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum-over-B-Lmax", "sum-over-Lmax"]


@dataclass(frozen=True, kw_only=True)
class PerToken:
    """Base of the objectives. Losses are plain and per token; the caller sums `loss_weights * loss` over the update.

    An objective reads `logprobs` and what it `needs` only where `loss_mask` is True: it selects with `where` before it
    computes, since garbage times zero is still garbage (inf * 0 = nan), and in the gradient as well.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}
    needs: ClassVar[frozenset[str]] = frozenset()  # of {"old_logprobs", "old_entropy"}
    metrics: ClassVar[Mapping[str, Literal["mean", "max", "min"]]] = {  # every key it reports, and how it is reduced
        "objective/nll": "mean",
        "objective/clip_fraction": "mean",
        "objective/ratio_mean": "mean",
        "objective/ratio_max": "max",
        "objective/ratio_min": "min",
        "objective/ppo_kl": "mean",
    }  # these every objective has, so that one script reads them all; a subclass adds its own

    aggregation: Aggregation = "token-mean"
    max_response_length: int | None = None  # L_max, the constant that the Lmax aggregations divide by

    def __post_init__(self) -> None:
        known = get_args(Aggregation)
        if self.aggregation not in known:
            raise Refused(f"aggregation={self.aggregation!r}", "is not known", f"use one of {', '.join(known)}")
        over_lmax = self.aggregation.endswith("Lmax")
        if over_lmax and (self.max_response_length is None or self.max_response_length < 1):
            raise Refused(
                f"max_response_length={self.max_response_length}",
                f"aggregation={self.aggregation!r} divides by it",
                "set the length of the longest response that is allowed, 1 or more",
            )
        if not over_lmax and self.max_response_length is not None:
            raise Refused(
                f"max_response_length={self.max_response_length}",
                f"aggregation={self.aggregation!r} does not use it",
                "leave it out, or use sum-over-B-Lmax or sum-over-Lmax",
            )

    @property
    def selects(self) -> bool:
        """Whether `select` names fewer than all trained tokens."""
        return False

    def select(self, batch: Microbatch) -> Tensor | None:
        """[B, S] bool: the tokens that the loss weights are renormalised to; None where it is every trained token.

        Where it is not None, the training step counts True over the update and all ranks (n of N trained tokens) and
        multiplies `loss_weights` by N / n before it calls the objective.
        """
        return None
