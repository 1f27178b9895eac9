"""What every objective says about itself, and the checks that all of them share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, get_args, get_origin, get_type_hints

from torch import Tensor

from megapsft.errors import Refused
from megapsft.types import AdvantageOptions, Microbatch, Over, VocabularyTerm


@dataclass(frozen=True, kw_only=True)
class Base:
    """Base of the objectives. Losses are plain and per token; the caller sums `loss_weights * loss` over the update.

    An objective reads `logprobs` and what it `needs` only where `loss_mask` is True: it selects with `where` before it
    computes, since garbage times zero is still garbage (inf * 0 = nan), and in the gradient as well.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}
    needs: ClassVar[frozenset[str]] = frozenset()  # fields of Microbatch that it reads beside those of every microbatch
    totals_need: ClassVar[frozenset[str] | None] = None  # fields that `totals` reads; None where it counts nothing
    trains_on: ClassVar[frozenset[str]] = frozenset({"demonstrations", "rollouts"})  # a third kind is "preferences"
    entropy_gradient: ClassVar[bool] = False  # whether the loss has a gradient through the entropy
    term: ClassVar[VocabularyTerm | None] = None  # what the head is to compute beside log-probability and entropy
    advantages: ClassVar[AdvantageOptions | None] = None  # what is made of rewards; None where they are not read
    critic: ClassVar[bool] = False  # whether a value function is trained beside the policy, by `value_loss`
    metrics: ClassVar[Mapping[str, Over]] = {  # every key it reports, and how it is reduced
        "objective/nll": "mean",
        "objective/clip_fraction": "mean",
        "objective/ratio_mean": "mean",
        "objective/ratio_max": "max",
        "objective/ratio_min": "min",
        "objective/log_ratio_p01": "p01",
        "objective/log_ratio_p50": "p50",
        "objective/log_ratio_p99": "p99",
        "objective/ppo_kl": "mean",
    }  # these every objective has, so that one script reads them all; a subclass adds its own

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            known = get_args(hints[field.name])
            if get_origin(hints[field.name]) is Literal and getattr(self, field.name) not in known:
                rule = "is not known"
                raise Refused(f"{field.name}={getattr(self, field.name)!r}", rule, f"use one of {', '.join(map(str, known))}")

    @property
    def clip_range(self) -> tuple[float | None, float | None]:
        """(low, high): ratios to the old policy are clipped at 1 - low and 1 + high; None: not on that side."""
        return None, None

    def keep(self, rewards: Sequence[float], demonstrations: Sequence[bool]) -> Sequence[bool]:
        """Which samples of a group are trained at all, decided before anything is weighed. Here: every one."""
        return [True] * len(rewards)

    def totals(self, batch: Microbatch) -> Mapping[str, Tensor]:
        """Scalars of this microbatch that `__call__` wants summed over the whole update and all ranks, as `batch.totals`.

        They may depend on what stands in the batch before the update (`totals_need`), never on the training pass.
        """
        return {}
