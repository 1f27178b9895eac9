"""What a step computes, before any data is read: samples as long as they may be, in packs without padding."""

from __future__ import annotations

from dataclasses import dataclass

from megapsft.config import Config
from megapsft.errors import Refused
from megapsft.objectives._mixture import Mixture
from megapsft.parallel import Mesh
from megapsft.train.phases import Phase, has_old_policy, reference_needs
from megapsft.types import Objective

ASSUMED = "every sample is as long as data.max_length, and packs have no padding"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Of one step, for one rank where nothing else is said."""

    phase: Phase  # the one of the objective; a warm-up is cheaper
    updates: int
    samples: int  # an update, over all ranks
    length: int  # tokens of a sample
    positions: int  # of a microbatch, before it is sliced over context-parallel ranks
    microbatches: int  # an update, on each rank
    old_passes: int  # passes over an update's samples without gradient, in a step: of the old policy
    reference_passes: int  # of the frozen reference
    at_once: int  # microbatches that such a pass takes as one
    requests: int  # responses that are sampled, over all ranks; 0 where none are

    @property
    def tokens(self) -> int:
        """Of a step, over all ranks."""
        return self.updates * self.samples * self.length

    @property
    def critic(self) -> bool:
        return self.phase.objective.critic


def workload(config: Config, mesh: Mesh, phase: Phase) -> Workload:
    """The work of a step of `phase` under `mesh`.

    Raises:
        Refused: an update has fewer samples than there are data-parallel ranks.
    """
    train, data = config.train, config.data
    objective = phase.objective
    rows = train.minibatch_size or train.batch_size
    samples, updates = rows * samples_a_row(config, objective), train.batch_size // rows
    together = 2 if data.kind == "preferences" else 1  # the sides of a pair share a microbatch
    _check_ranks(mesh, samples // together)
    longest = together * data.max_length
    capacity = max(data.pack_length, longest) if data.packing else data.micro_batch_size * data.max_length
    microbatches = -(-samples * data.max_length // (capacity * mesh.dp))
    if mesh.vpp > 1:  # Megatron's interleaved schedule
        microbatches = -(-microbatches // mesh.pp) * mesh.pp
    even = -(-samples * data.max_length // (microbatches * mesh.dp))  # megapsft.data.plan makes microbatches even
    return Workload(
        phase=phase,
        updates=updates,
        samples=samples,
        length=data.max_length,
        positions=max(even, longest),
        microbatches=microbatches,
        old_passes=updates - 1 if has_old_policy(objective) else 0,
        reference_passes=updates if reference_needs(objective) else 0,
        at_once=min(train.no_grad_microbatches, microbatches),
        requests=train.batch_size * config.rollout.n if data.kind == "prompts" else 0,
    )


def samples_a_row(config: Config, objective: Objective) -> int:
    """Sequences that are trained for each row: the sides of a pair; rollouts, and the demonstration of mixtures.

    Of recorded rollouts as many are assumed as rollout.n says of sampled ones.
    """
    if config.data.kind == "demonstrations":
        return 1
    if config.data.kind == "preferences":
        return 2
    return config.rollout.n + isinstance(objective, Mixture)


def _check_ranks(mesh: Mesh, samples: int) -> None:
    if mesh.dp > samples:
        wider = -(-mesh.dp // samples)
        raise Refused(
            f"world size {mesh.world_size}",
            f"has {mesh.dp} data-parallel ranks for the {samples} samples (or pairs) of an update: the others would be idle",
            f"use {mesh.world_size // wider} GPUs, or spread samples over {wider} times as many ranks "
            f"(parallel.context_parallel_size={mesh.cp * wider}), or a larger train.minibatch_size",
        )
