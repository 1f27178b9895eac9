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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megapsft.checkpoint.hf import import_hf, init_adapters
from megapsft.config import FP8Config
from megapsft.data.prompts import Prompts
from megapsft.errors import Refused
from megapsft.objectives.registry import build_objective
from megapsft.platform.memory import free_models
from megapsft.policy.build import Policy, build_chunks, half, transformer_config
from megapsft.policy.lora import with_adapters
from megapsft.policy.merge import merge
from megapsft.train.build import build_policy, policy_of
from megapsft.train.noise import Bench, Floor, Row
from megapsft.train.noise_limit import limit_of
from megapsft.train.phases import has_old_policy
from megapsft.train.plan import RunPlan
from megapsft.train.precision import Precision, compare, name_of, outputs_of
from megapsft.train.prepare import with_advantages
from megapsft.types import Group, Minibatch

FP8, DTYPE = "fp8.format", "model.dtype"
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
    Feature(FP8, None, "in bfloat16", "the rounding of FP8"),
    Feature(DTYPE, "float32", "in float32", "the rounding of bfloat16"),
)
PRECISIONS = (FP8, DTYPE)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was measured, the same on every rank."""

    rows: tuple[Row, ...]  # the first is the run as configured
    clip_low: float | None  # ratios are clipped at 1 - clip_low and 1 + clip_high; None: not on that side
    clip_high: float | None
    unit: Literal["tokens", "samples"]  # that have a ratio
    notes: tuple[str, ...]
    precisions: tuple[Precision, ...] = ()  # the run's beside each finer one that there is
    limit: float | None = None  # the share that noise may clip before training is refused; None: it is not measured there

    def floor(self, row: Row) -> Floor:
        return Floor.of(row.log_ratios, (self.clip_low, self.clip_high))

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
    bench = Bench(groups, plan)
    rows, precisions = _as_configured(bench, plan)
    free_models()
    if rows[0].log_ratios.any():
        rows += _each_removed(bench, plan, rows)
    clip_low, clip_high = (objective if has_old_policy(objective) else build_objective({"name": "psft"})).clip_range
    return Probe(
        rows=tuple(rows),
        clip_low=clip_low,
        clip_high=clip_high,
        unit=bench.unit,
        notes=_notes(plan, rows),
        precisions=precisions,
        limit=limit_of(plan.config, objective),
    )


def changed(plan: RunPlan, key: str, value: Any) -> RunPlan:
    """The plan with another value of one key of its config."""
    section, _, name = key.partition(".")
    old = plan.config
    config = dataclasses.replace(old, **{section: dataclasses.replace(getattr(old, section), **{name: value})})
    if key == DTYPE and value != "bfloat16":
        config = dataclasses.replace(config, fp8=FP8Config())  # which is of models in bfloat16
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


def _as_configured(bench: Bench, plan: RunPlan) -> tuple[list[Row], tuple[Precision, ...]]:
    """The run as configured, and then what it would be with other old passes; and its precision beside finer ones."""
    single = changed(plan, MERGED, 1)
    shared = [feature for feature in FEATURES if feature.key not in (REPLAY, MERGED) and is_on(plan, feature)]
    elsewhere, finer = {}, []
    for feature in shared:
        if feature.key != PACKING:
            without = changed(single, feature.key, feature.off)
            frozen = _frozen_policy(without)
            elsewhere[feature.key] = bench.old_pass(frozen, single)  # laid out as configured: tokens are where they were
            if feature.key in PRECISIONS:
                finer.append(outputs_of(bench, frozen, plan, name_of(without.config), elsewhere[feature.key].logprobs))
            del frozen
            free_models()

    policy = build_policy(plan)
    bench.warm(policy, plan)
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
    if not finer:
        return rows, ()
    ours = outputs_of(bench, policy, plan, name_of(plan.config), free.logprobs)
    return rows, tuple(compare(bench, policy, plan, ours, other) for other in finer)


def _packs_as_one(minibatch: Minibatch, plan: RunPlan) -> int:
    """How many packs an old pass takes as one: as configured, else as few as can be; 1 where their number allows none."""
    configured, multiple = plan.config.train.no_grad_microbatches, plan.mesh.pp if plan.mesh.vpp > 1 else 1
    tried = [configured] if configured > 1 else range(2, len(minibatch.microbatches) + 1)
    sizes = (merge(minibatch, at_once, multiple)[1] for at_once in tried)
    return next((size for size in sizes if size > 1), 1)


def _each_removed(bench: Bench, plan: RunPlan, rows: Sequence[Row]) -> list[Row]:
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
        bench.warm(policy, without)
        removed.append(bench.measure(policy, without, kind="removed", title=feature.without, feature=feature.key))
        del policy
        free_models()
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


def _notes(plan: RunPlan, rows: Sequence[Row]) -> tuple[str, ...]:
    phase, notes = plan.phases[-1], []
    if not has_old_policy(phase.objective):
        notes.append(f"objective.name={phase.objective_name} has no old policy: probed as if it were psft.")
    if any(row.kind == "repeated" for row in rows):
        of_fp8 = plan.config.fp8.format is not None and plan.config.fp8.recipe == "delayed"
        why = "fp8.recipe=delayed takes its scales from the passes before" if of_fp8 else "The device is not deterministic"
        notes.append(f"{why}: the same training pass twice gives other bits.")
    if not any(row.kind == "not shared" for row in rows):
        notes.append("The training pass has no feature that an old pass could lack.")
    return tuple(notes)


__all__ = ["FEATURES", "Feature", "Probe", "changed", "first_groups", "is_on", "measure_noise"]
