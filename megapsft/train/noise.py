"""Passes over the same samples with the same weights, and how far their log-probabilities are from each other.

What differs between two such passes is noise: nothing was learned in between.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megapsft.data.pack import pack
from megapsft.errors import Refused
from megapsft.models.router import Router
from megapsft.objectives.gspo import GSPO
from megapsft.policy.build import Policy
from megapsft.policy.constants import with_old_policy
from megapsft.policy.forward import forward_backward, read
from megapsft.policy.per_sample import gather_samples
from megapsft.train.plan import RunPlan
from megapsft.types import Group, Microbatch, TrainBatch

QUANTILES = (0.5, 0.9, 0.99, 0.999)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison of the training pass with an old pass."""

    kind: Literal["configured", "repeated", "removed", "not shared"]  # repeated: the training pass with itself
    title: str
    feature: str | None = None  # the key of what is removed, or not shared
    replayed: bool | None = None  # None: the model has no experts
    log_ratios: np.ndarray  # [tokens] fp64, or [samples] where the objective has one ratio a sample
    flipped: float | None = None  # share of real tokens x MoE layers with another set of experts; None: not comparable


@dataclass(frozen=True, kw_only=True)
class Floor:
    """A row in numbers; quantiles and the largest are of |ratio - 1|."""

    differ: float  # share of ratios that are not exactly 1
    mean: float  # of |log ratio|
    quantiles: dict[float, float]
    largest: float
    clipped: float  # share of ratios outside the clip range

    @staticmethod
    def of(log_ratios: np.ndarray, clip_range: tuple[float | None, float | None]) -> Floor:
        """Of [n] log ratios and the `clip_range` of an objective."""
        distance = np.expm1(log_ratios)
        low, high = clip_range
        outside = (distance < (-np.inf if low is None else -low)) | (distance > (np.inf if high is None else high))
        away = np.abs(distance)
        return Floor(
            differ=float((log_ratios != 0).mean()),
            mean=float(np.abs(log_ratios).mean()),
            quantiles={q: float(np.quantile(away, q)) for q in QUANTILES},
            largest=float(away.max()),
            clipped=float(outside.mean()),
        )


Routing = Sequence[Sequence[Mapping[int, Tensor]]]
"""By minibatch and microbatch of this rank: MoE layer -> [tokens, K] experts."""


@dataclass(frozen=True)
class Passed:
    """What one pass gave."""

    logprobs: Tensor  # [trained tokens] fp64 on the host: by sample, then by position; the same on every rank
    routing: Routing | None  # None: the model has no experts


class Bench:
    """The samples that all passes are made over, and the passes.

    Args:
        plan: its objective says whether a ratio is of a token or of a sample.
    """

    def __init__(self, groups: Sequence[Group], plan: RunPlan):
        self.groups, self.minibatch_size = groups, plan.minibatch_size
        self.by_sample = isinstance(plan.phases[-1].objective, GSPO)
        trained = [np.flatnonzero(sample.loss_mask[1:]) for group in groups for sample in group]  # the positions that predict
        self.samples = np.repeat(np.arange(len(trained)), [len(positions) for positions in trained])  # [trained tokens]
        self.positions = np.concatenate(trained)  # [trained tokens]

    @property
    def unit(self) -> Literal["tokens", "samples"]:
        """What has a ratio."""
        return "samples" if self.by_sample else "tokens"

    def batch(self, plan: RunPlan) -> TrainBatch:
        """This rank's part of the samples, cut into updates as the run would."""
        objective = plan.phases[-1].objective
        return pack(
            self.groups,
            minibatch_size=self.minibatch_size,
            layout=plan.layout(parallel_state.get_data_parallel_rank(), parallel_state.get_context_parallel_rank()),
            aggregation=objective.aggregation,
            max_response_length=objective.max_response_length,
            pad_token_id=plan.template.pad_token_id,
            together=plan.config.data.kind == "preferences",
        )

    def warm(self, policy: Policy, plan: RunPlan) -> None:
        """Collective. One training pass where the next depends on it: delayed scaling knows no scales yet."""
        if plan.config.fp8.format is not None and plan.config.fp8.recipe == "delayed":
            self.training_pass(policy, plan)

    def measure(self, policy: Policy, plan: RunPlan, **about: Any) -> Row:
        """Collective. The training pass against the old pass, each as the run of `plan` makes it."""
        old = self.old_pass(policy, plan)
        new = self.training_pass(policy, plan, old.routing if policy.routing_replay else None)
        return self.row(new, old, **about, replayed=policy.routing_replay if plan.hf.num_experts else None)

    def old_pass(self, policy: Policy, plan: RunPlan) -> Passed:
        """Collective. Without gradient, laid out as `plan` says, and with its experts recorded."""
        experts, at_once = bool(plan.hf.num_experts), plan.config.train.no_grad_microbatches
        policy = dataclasses.replace(policy, routing_replay=experts, no_grad_microbatches=at_once)
        batch = self.batch(plan)
        filled = [with_old_policy(policy, minibatch).microbatches for minibatch in batch.minibatches]
        logprobs = self.by_token(batch, [[m.old_logprobs for m in one] for one in filled], policy)
        return Passed(logprobs, [[m.routing for m in one] for one in filled] if experts else None)

    def training_pass(self, policy: Policy, plan: RunPlan, routing: Routing | None = None) -> Passed:
        """Collective. Forward and backward of the negative log-likelihood, with these experts or the policy's own choice."""
        batch, found, made = self.batch(plan), [], []
        for number, minibatch in enumerate(batch.minibatches):
            kept: list[Tensor] = []

            def consume(output: Tensor, microbatch: Microbatch, kept: list[Tensor] = kept) -> tuple[Tensor, None]:
                logprobs = read(output).logprobs
                kept.append(logprobs.detach())
                return -torch.where(microbatch.loss_mask, microbatch.loss_weights * logprobs, 0.0).sum(), None

            if routing is not None:
                pairs = zip(minibatch.microbatches, routing[number], strict=True)
                replayed = tuple(dataclasses.replace(microbatch, routing=one) for microbatch, one in pairs)
                minibatch = dataclasses.replace(minibatch, microbatches=replayed)
            with _choices(policy, len(minibatch.microbatches)) as choices:
                forward_backward(policy, minibatch, consume)
            found.append(kept)
            made.append(choices)
        return Passed(self.by_token(batch, found, policy), made if plan.hf.num_experts else None)

    def compare(self, policy: Policy, plan: RunPlan, free: Passed, old: Passed, **about: Any) -> list[Row]:
        """Collective. The training pass `free` against `old`; with experts then also with replay, the configured one first."""
        if old.routing is None:
            return [self.row(free, old, **about)]
        flipped = self._flipped(policy, plan, free.routing, old.routing)
        replayed = self.training_pass(policy, plan, old.routing)
        rows = [
            self.row(free, old, **about, replayed=False, flipped=flipped),
            self.row(replayed, old, **about, replayed=True, flipped=self._flipped(policy, plan, replayed.routing, old.routing)),
        ]
        return rows[::-1] if policy.routing_replay and about["kind"] == "configured" else rows

    def row(self, new: Passed, old: Passed, **about: Any) -> Row:
        log_ratios = (new.logprobs - old.logprobs).numpy()
        if self.by_sample:
            tokens = np.bincount(self.samples)
            log_ratios = (np.bincount(self.samples, log_ratios) / np.maximum(tokens, 1))[tokens > 0]
        return Row(log_ratios=log_ratios, **about)

    def by_token(self, batch: TrainBatch, tokens: Sequence[Sequence[Tensor]], policy: Policy) -> Tensor:
        """Collective. [trained tokens] fp64 of all ranks, in an order that no layout changes.

        Args:
            tokens: [B, S] of each microbatch of each minibatch of this rank.

        Raises:
            Refused: a value is not finite.
        """
        tables = gather_samples(batch, tokens, policy.head() is not None, policy.device)
        longest = max(table.shape[1] for table in tables)
        table = torch.cat([torch.nn.functional.pad(table, (0, longest - table.shape[1])) for table in tables]).cpu()
        values = table[self.samples, self.positions]
        if not values.isfinite().all():
            rule = f"gives log-probabilities that are not finite in {str(policy.config.params_dtype).removeprefix('torch.')}"
            raise Refused(f"model.path={policy.source}", rule, "look for weights that are not finite")
        return values

    def _flipped(self, policy: Policy, plan: RunPlan, new: Routing, old: Routing) -> float:
        """Collective. The share of real tokens x MoE layers whose set of experts is another, over all ranks."""
        place, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
        counts = torch.zeros(2, dtype=torch.float64)
        for number, minibatch in enumerate(self.batch(plan).minibatches):
            for microbatch, ours, theirs in zip(minibatch.microbatches, new[number], old[number], strict=True):
                # routers see [S, B]; experts under tensor parallelism always come with sequence parallelism
                real = (microbatch.sample_ids >= 0).T.chunk(size)[place].flatten()
                for layer, experts in ours.items():
                    pair = [chosen.cpu().long().sort(dim=-1).values for chosen in (experts, theirs[layer])]
                    other = (pair[0] != pair[1]).any(dim=-1)
                    counts += torch.stack([other[real].sum(), real.sum()])
        counts = counts.to(policy.device)
        dist.all_reduce(counts)
        flipped, places = counts.tolist()
        return flipped / places


@contextmanager
def _choices(policy: Policy, microbatches: int) -> Iterator[list[dict[int, Tensor]]]:
    """For each microbatch of the forward passes inside, in order: MoE layer -> [tokens, K] experts that its router chose."""
    made: list[dict[int, Tensor]] = [{} for _ in range(microbatches)]
    seen: dict[int, Iterator[int]] = {}  # by layer: stages of a pipeline are not at the same microbatch

    def keep(router: Router, inputs: Any, output: Any) -> None:
        if router.visit is None:  # a checkpoint runs again what has been counted
            return
        number = next(seen.setdefault(router.layer_number, itertools.count()))
        made[number][router.layer_number] = router.choice.made.to("cpu", torch.int16)

    routers = [module for gpt in policy.gpt_models() for module in gpt.modules() if isinstance(module, Router)]
    handles = [router.register_forward_hook(keep) for router in routers]
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["QUANTILES", "Bench", "Floor", "Passed", "Row"]
