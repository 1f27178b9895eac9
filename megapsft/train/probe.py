"""How far the ratio of the training pass to the old pass is from 1 before anything is learned, and what makes it so.

Objectives with a ratio compare exp(logprobs - old_logprobs) with a clip range. With the same weights in both passes every ratio
should be 1; what it is instead is noise, which is clipped like learning. Two questions are asked of the first samples of the run:

- As configured: is it 1? Where not, each feature that is on is turned off in both passes, one at a time: whose absence lowers the
  noise most is its cause.
- What would it be if the old pass lacked a feature of the training pass, as a rollout engine or another layout would?

Of a mixture of experts each is measured with free routing and with routing replay (the training pass chooses the experts that the
old pass chose), if both passes have their tokens in the same order.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megapsft.checkpoint.hf import import_hf, init_adapters
from megapsft.data.pack import pack
from megapsft.data.prompts import Prompts
from megapsft.errors import Refused
from megapsft.models.router import Router
from megapsft.objectives.gspo import GSPO
from megapsft.objectives.registry import build_objective
from megapsft.policy.build import Policy, build_chunks, half, transformer_config
from megapsft.policy.constants import with_old_policy
from megapsft.policy.forward import forward_backward, read
from megapsft.policy.lora import with_adapters
from megapsft.policy.merge import merge
from megapsft.policy.per_sample import gather_samples
from megapsft.train.phases import has_old_policy
from megapsft.train.plan import RunPlan
from megapsft.train.prepare import with_advantages
from megapsft.train.run import build_policy, policy_of
from megapsft.types import Group, Microbatch, Minibatch, TrainBatch

QUANTILES = (0.5, 0.9, 0.99, 0.999)
REPLAY, MERGED, PACKING = "model.moe_routing_replay", "train.no_grad_microbatches", "data.packing"


@dataclass(frozen=True)
class Feature:
    """Something that a pass may have or not, by its key."""

    key: str
    off: Any  # the value of the key without it
    without: str  # what a pass without it is called
    cause: str

    @property
    def remedy(self) -> str:
        return f"{self.key}={'null' if self.off is None else str(self.off).lower()}"


FEATURES = (  # what costs least to do without comes first: of two that explain the noise alike it is named
    Feature(MERGED, 1, "single packs", "that the old pass takes several packs as one"),
    Feature(REPLAY, True, "routing replay", "that experts are chosen anew in the training pass"),
    Feature("parallel.recompute_granularity", None, "not recomputed", "recomputation"),
    Feature(PACKING, False, "unpacked", "packing"),
    Feature("model.dtype", "float32", "in float32", "the rounding of bfloat16"),
)


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


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was measured, the same on every rank."""

    rows: tuple[Row, ...]  # the first is the run as configured
    clip_low: float | None  # ratios are clipped at 1 - clip_low and 1 + clip_high; None: not on that side
    clip_high: float | None
    unit: Literal["tokens", "samples"]  # that have a ratio
    notes: tuple[str, ...]

    def floor(self, row: Row) -> Floor:
        distance = np.expm1(row.log_ratios)
        low = -np.inf if self.clip_low is None else -self.clip_low
        high = np.inf if self.clip_high is None else self.clip_high
        away = np.abs(distance)
        return Floor(
            differ=float((row.log_ratios != 0).mean()),
            mean=float(np.abs(row.log_ratios).mean()),
            quantiles={q: float(np.quantile(away, q)) for q in QUANTILES},
            largest=float(away.max()),
            clipped=float(((distance < low) | (distance > high)).mean()),
        )

    def cause(self) -> Feature | None:
        """Whose removal lowers the noise of the run as configured most; None where there is none, or no removal halves it."""
        first, noise = self.rows[0], {id(row): float(np.abs(row.log_ratios).mean()) for row in self.rows}
        removed = {row.feature: row for row in self.rows if row.kind == "removed"}
        found = [(feature, removed[feature.key]) for feature in FEATURES if feature.key in removed]
        feature, row = min(found, key=lambda pair: noise[id(pair[1])], default=(None, first))
        return feature if noise[id(row)] < noise[id(first)] / 2 else None


def first_groups(plan: RunPlan, samples: int | None) -> list[Group]:
    """The first groups of the run that its objective trains: `samples` of them, or those of its first update.

    Raises:
        Refused: fewer than 1 or more than there are, or no token of them is trained.
    """
    if isinstance(plan.data, Prompts):
        rule = "has no responses yet whose ratios could be measured"
        raise Refused("data.kind=prompts", rule, "record some: megapsft rollout, then data.kind=rollouts")
    there = len(plan.data.groups)
    if samples is not None and not 1 <= samples <= there:
        raise Refused(f"--samples {samples}", f"must be 1 to {there}, the rows of {plan.config.data.path}", "leave it out")
    count, groups = plan.minibatch_size if samples is None else samples, []
    for step in range(-(-there // plan.config.train.batch_size)):  # at most one epoch: the objective may keep few of them
        if len(groups) < count:
            groups += with_advantages(plan.rows.next_groups(step), plan.phases[-1].objective)
    groups = groups[:count]
    if not any(sample.loss_mask[1:].any() for group in groups for sample in group):
        raise Refused(f"the first {count} rows", "have no trained token: there is nothing to compare", "use more --samples")
    return groups


def measure_noise(plan: RunPlan, samples: int | None = None) -> Probe:
    """Collective. Rows of the first update, or of the first `samples` groups; no update is made.

    One model is held at a time: those of old passes that need one of their own come first.

    Raises:
        Refused: as `first_groups`, or a pass gives log-probabilities that are not finite.
    """
    groups = first_groups(plan, samples)
    plan = changed(plan, "parallel.overlap_param_gather", False)  # there is no optimizer whose parameters to gather
    objective = plan.phases[-1].objective
    bench = _Bench(groups, plan.minibatch_size, by_sample=isinstance(objective, GSPO))
    rows = _as_configured(bench, plan)
    _free()
    if rows[0].log_ratios.any():
        rows += _each_removed(bench, plan, rows)
    psft = build_objective({"name": "psft"})
    clip = objective if has_old_policy(objective) else psft
    return Probe(
        rows=tuple(rows),
        clip_low=getattr(clip, "clip_low", None),
        clip_high=getattr(clip, "clip_high", psft.clip_high),
        unit="samples" if bench.by_sample else "tokens",
        notes=_notes(plan, rows),
    )


def changed(plan: RunPlan, key: str, value: Any) -> RunPlan:
    """The plan with another value of one key of its config."""
    section, _, name = key.partition(".")
    old = plan.config
    config = dataclasses.replace(old, **{section: dataclasses.replace(getattr(old, section), **{name: value})})
    if key == PACKING and config.data.kind == "preferences" and config.data.micro_batch_size % 2:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, micro_batch_size=2))  # both sides together
    return dataclasses.replace(plan, config=config)


def is_on(plan: RunPlan, feature: Feature) -> bool:
    """Whether the run as configured has it."""
    if feature.key == REPLAY:
        return bool(plan.hf.num_experts) and not plan.config.model.moe_routing_replay
    if feature.key == MERGED:
        return plan.config.data.packing and plan.config.train.no_grad_microbatches > 1
    section, _, name = feature.key.partition(".")
    return getattr(getattr(plan.config, section), name) != feature.off


def _as_configured(bench: _Bench, plan: RunPlan) -> list[Row]:
    """The run as configured, and then what it would be with other old passes."""
    single = changed(plan, MERGED, 1)
    shared = [feature for feature in FEATURES if feature.key not in (REPLAY, MERGED) and is_on(plan, feature)]
    elsewhere = {}
    for feature in shared:
        if feature.key != PACKING:
            without = changed(single, feature.key, feature.off)
            elsewhere[feature.key] = bench.old_pass(_frozen_policy(without), without)
            _free()

    policy = build_policy(plan)
    free = bench.training_pass(policy, plan)
    again = bench.training_pass(policy, plan)
    rows = bench.compare(policy, plan, free, bench.old_pass(policy, plan), kind="configured", title="as configured")
    if (again.logprobs != free.logprobs).any():
        rows.append(bench.row(again, free, kind="repeated", title="training twice"))
    packs = _packs_as_one(bench.batch(plan).minibatches[0], plan)
    if packs > 1:
        old = bench.old_pass(policy, changed(plan, MERGED, packs))
        rows += bench.compare(policy, plan, free, old, kind="not shared", title=f"{packs} packs as one", feature=MERGED)
    for feature in shared:
        about: dict[str, Any] = {"kind": "not shared", "title": feature.without, "feature": feature.key}
        if feature.key == PACKING:
            old = bench.old_pass(policy, changed(single, PACKING, False))
            rows.append(bench.row(free, old, **about, replayed=False if plan.hf.num_experts else None))
        else:
            rows += bench.compare(policy, plan, free, elsewhere[feature.key], **about)
    return rows


def _packs_as_one(minibatch: Minibatch, plan: RunPlan) -> int:
    """How many packs an old pass takes as one: as configured, else as few as can be; 1 where their number allows none."""
    configured, multiple = plan.config.train.no_grad_microbatches, plan.mesh.pp if plan.mesh.vpp > 1 else 1
    tried = [configured] if configured > 1 else range(2, len(minibatch.microbatches) + 1)
    sizes = (merge(minibatch, at_once, multiple)[1] for at_once in tried)
    return next((size for size in sizes if size > 1), 1)


def _each_removed(bench: _Bench, plan: RunPlan, rows: Sequence[Row]) -> list[Row]:
    """The run as configured with one feature less in both passes, each in turn."""
    removed = []
    for feature in FEATURES:
        if not is_on(plan, feature):
            continue
        if feature.key == REPLAY:  # has been measured
            (row,) = [row for row in rows if row.kind == "configured" and row.replayed]
            removed.append(dataclasses.replace(row, kind="removed", title=feature.without, feature=feature.key))
            continue
        without = changed(plan, feature.key, feature.off)
        policy = build_policy(without)
        old = bench.old_pass(policy, without)
        new = bench.training_pass(policy, without, old.routing if policy.routing_replay else None)
        replayed = policy.routing_replay if plan.hf.num_experts else None
        about = {"title": feature.without, "feature": feature.key, "replayed": replayed}
        removed.append(bench.row(new, old, kind="removed", **about))
        del policy
        _free()
    return removed


def _frozen_policy(plan: RunPlan) -> Policy:
    """Collective. The policy for passes without gradient: it takes the memory of its weights alone."""
    config = plan.config
    megatron = transformer_config(plan.family, plan.hf, config.model, config.parallel, plan.mesh, config.fp8)
    chunks = build_chunks(megatron, plan.hf, config.model, plan.mesh)
    with_adapters(chunks, config.lora)
    import_hf(chunks, Path(config.model.path), plan.hf)
    init_adapters(chunks, plan.hf, config.lora, config.train.seed)
    return policy_of(plan, half(chunks, megatron), megatron)


Routing = Sequence[Sequence[Mapping[int, Tensor]]]
"""By minibatch and microbatch of this rank: MoE layer -> [tokens, K] experts."""


@dataclass(frozen=True)
class Passed:
    """What one pass gave."""

    logprobs: Tensor  # [trained tokens] fp64 on the host: by sample, then by position; the same on every rank
    routing: Routing | None  # None: the model has no experts


class _Bench:
    """The samples that all passes are made over."""

    def __init__(self, groups: Sequence[Group], minibatch_size: int, by_sample: bool):
        self.groups, self.minibatch_size, self.by_sample = groups, minibatch_size, by_sample
        trained = [np.flatnonzero(sample.loss_mask[1:]) for group in groups for sample in group]  # the positions that predict
        self.samples = np.repeat(np.arange(len(trained)), [len(positions) for positions in trained])  # [trained tokens]
        self.positions = np.concatenate(trained)  # [trained tokens]

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

    def old_pass(self, policy: Policy, plan: RunPlan) -> Passed:
        """Collective. Without gradient, laid out as `plan` says, and with its experts recorded."""
        experts, at_once = bool(plan.hf.num_experts), plan.config.train.no_grad_microbatches
        policy = dataclasses.replace(policy, routing_replay=experts, no_grad_microbatches=at_once)
        batch = self.batch(plan)
        filled = [with_old_policy(policy, minibatch).microbatches for minibatch in batch.minibatches]
        logprobs = self._by_token(batch, [[m.old_logprobs for m in one] for one in filled], policy, plan)
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
        return Passed(self._by_token(batch, found, policy, plan), made if plan.hf.num_experts else None)

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

    def _by_token(self, batch: TrainBatch, tokens: Sequence[Sequence[Tensor]], policy: Policy, plan: RunPlan) -> Tensor:
        """Collective. [trained tokens] fp64 of all ranks, in an order that no layout changes.

        Raises:
            Refused: a value is not finite.
        """
        tables = gather_samples(batch, tokens, policy.head() is not None, policy.device)
        longest = max(table.shape[1] for table in tables)
        table = torch.cat([torch.nn.functional.pad(table, (0, longest - table.shape[1])) for table in tables]).cpu()
        values = table[self.samples, self.positions]
        if not values.isfinite().all():
            rule = f"gives log-probabilities that are not finite in {plan.config.model.dtype}"
            raise Refused(f"model.path={plan.config.model.path}", rule, "look for weights that are not finite")
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


def _free() -> None:
    """Give back the memory of a model that was let go: Megatron's wrappers hold themselves in cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _notes(plan: RunPlan, rows: Sequence[Row]) -> tuple[str, ...]:
    phase, notes = plan.phases[-1], []
    if not has_old_policy(phase.objective):
        notes.append(f"objective.name={phase.objective_name} has no old policy: probed as if it were psft.")
    if any(row.kind == "repeated" for row in rows):
        notes.append("The device is not deterministic: the same training pass twice gives other bits.")
    if not any(row.kind == "not shared" for row in rows):
        notes.append("The training pass has no feature that an old pass could lack.")
    return tuple(notes)


__all__ = ["FEATURES", "QUANTILES", "Feature", "Floor", "Probe", "Row", "changed", "first_groups", "is_on", "measure_noise"]
