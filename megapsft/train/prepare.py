"""What a step needs before its first update: rewards become advantages, and the passes without gradient are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from megapsft.advantages.registry import estimate
from megapsft.platform.clock import part
from megapsft.policy.build import Policy
from megapsft.policy.constants import with_old_policy, with_reference
from megapsft.policy.reference import Reference
from megapsft.train.phases import first_old_pass, has_old_policy, reference_needs
from megapsft.types import Group, Objective, TrainBatch


def with_advantages(groups: Sequence[Group], objective: Objective) -> list[Group]:
    """The groups that the objective trains, each sample with its advantage; groups of which it keeps nothing are gone.

    The samples of the step decide together, so this comes before anything is packed or weighed.
    """
    kept = list(trained_groups(groups, objective))
    options = objective.advantages
    if not kept or options is None or options.estimator == "gae":
        return kept
    numbered = [(number, sample) for number, group in enumerate(kept) for sample in group]
    rewards, numbers = (np.array(column) for column in zip(*((s.reward, number) for number, s in numbered), strict=True))
    counts = np.array([options.demonstrations or not sample.demonstration for _, sample in numbered])
    advantages = np.zeros(len(numbered))
    advantages[counts] = estimate(options, rewards[counts], numbers[counts])
    of_samples = iter(advantages.tolist())
    return [tuple(dataclasses.replace(sample, advantage=next(of_samples)) for sample in group) for group in kept]


def trained_groups(groups: Iterable[Group], objective: Objective) -> Iterator[Group]:
    """Of each group the samples that the objective trains; groups of which it keeps nothing are gone."""
    for group in groups:
        flags = objective.keep([sample.reward for sample in group], [sample.demonstration for sample in group])
        kept = tuple(sample for sample, flag in zip(group, flags, strict=True) if flag)
        if kept:
            yield kept


def with_constants(policy: Policy, reference: Reference | None, batch: TrainBatch, objective: Objective) -> TrainBatch:
    """Collective. The batch with what the objective needs of the old policy and of the reference.

    Minibatches before `first_old_pass` have none of the old policy: their update takes its own values (`at_old_policy`).
    """
    minibatches = list(batch.minibatches)
    if has_old_policy(objective):
        first = first_old_pass(objective)
        if minibatches[first:]:
            with part("old_policy", wait=True):
                minibatches[first:] = [with_old_policy(policy, minibatch) for minibatch in minibatches[first:]]
    if reference is not None:
        needs = reference_needs(objective)
        with part("reference", wait=True):
            minibatches = [with_reference(policy, reference, minibatch, needs) for minibatch in minibatches]
    return TrainBatch(minibatches=tuple(minibatches))
