"""How long sequences are, and how full they make the positions that go through the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megapsft.config import Config
from megapsft.data.plan import Layout, plan_update
from megapsft.data.sampler import Sampler

BARS = 24
MOST_UPDATES = 200  # of an epoch, evenly spaced, that packing is worked out for


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Of lengths in tokens; the bars are equally wide."""

    name: str
    edges: tuple[int, ...]  # one more than there are counts; a bar holds its lower edge, and not its upper one
    counts: tuple[int, ...]
    minimum: int
    median: float
    p95: float
    maximum: int
    limits: Mapping[str, int]  # key of the config -> tokens


def histogram(name: str, lengths: Sequence[int], limits: Mapping[str, int]) -> Histogram | None:
    """Up to BARS bars from 0 to the longest; None of no lengths."""
    if not len(lengths):
        return None
    values = np.asarray(lengths)
    width = max(1, -(-(int(values.max()) + 1) // BARS))
    counts = np.bincount(values // width)
    return Histogram(
        name=name,
        edges=tuple(width * number for number in range(len(counts) + 1)),
        counts=tuple(counts.tolist()),
        minimum=int(values.min()),
        median=float(np.median(values)),
        p95=float(np.percentile(values, 95)),
        maximum=int(values.max()),
        limits=dict(limits),
    )


@dataclass(frozen=True, kw_only=True)
class Packing:
    """The microbatches of an epoch as the run plans them, over all data-parallel ranks."""

    updates: int  # looked at
    of_updates: int  # in an epoch
    microbatches: int
    positions: int  # that go through the model
    tokens: int  # of them: no padding
    trained: int  # of these
    longest: int  # positions of the longest microbatch
    worst: float  # the least part of an update's positions that is filled
    unpacked_positions: int  # that the same updates would take one sample a row, padded to the longest of its update

    @property
    def filled(self) -> float:
        return self.tokens / self.positions


def packing(groups: Sequence[Sequence[tuple[int, int]]], config: Config, layout: Layout) -> Packing | None:
    """What the plan of the run makes of an epoch; None where there is nothing to train.

    Args:
        groups: of each group the (tokens, trained tokens) of its samples.
    """
    if not groups:
        return None
    train = config.train
    size = train.minibatch_size or train.batch_size
    order = Sampler(len(groups), train.batch_size, train.seed, config.data.shuffle).draw(0, len(groups))
    updates = [order[start : start + size] for start in range(0, len(order), size)]
    chosen = np.unique(np.linspace(0, len(updates) - 1, min(len(updates), MOST_UPDATES)).astype(int))
    together = 2 if config.data.kind == "preferences" else 1
    microbatches = positions = tokens = trained = longest = unpacked = 0
    worst = 1.0
    for number in chosen:
        samples = [sample for index in updates[number] for sample in groups[index]]
        lengths = [length for length, _ in samples]
        plans = [plan for share in plan_update(lengths, layout, together) for plan in share]
        own = sum(len(plan.rows) * plan.length for plan in plans)
        microbatches, positions, tokens = microbatches + len(plans), positions + own, tokens + sum(lengths)
        trained += sum(count for _, count in samples)
        unpacked += max(lengths) * len(lengths)
        longest, worst = max(longest, *(plan.length for plan in plans)), min(worst, sum(lengths) / own)
    return Packing(
        updates=len(chosen),
        of_updates=len(updates),
        microbatches=microbatches,
        positions=positions,
        tokens=tokens,
        trained=trained,
        longest=longest,
        worst=worst,
        unpacked_positions=unpacked,
    )
