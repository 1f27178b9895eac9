"""Who computes what: the samples of an update into microbatches, and the microbatches onto data-parallel ranks.

Made from the lengths alone, by every rank for all ranks, so that they agree without talking.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The place of this rank in the split, and the shape that the split asks of microbatches."""

    packing: bool
    pack_length: int  # most positions of a packed microbatch; more only where the longest sample needs more
    micro_batch_size: int  # most rows of an unpacked microbatch
    data_parallel_rank: int = 0
    data_parallel_size: int = 1
    context_parallel_rank: int = 0
    context_parallel_size: int = 1
    tensor_parallel_size: int = 1
    sequence_parallel: bool = False  # cuts the positions of a rank once more, over tensor-parallel ranks
    alignment: int = 1  # of the positions that a rank computes at once, B * S after all slicing (products in FP8)
    microbatch_multiple: int = 1  # of the number of microbatches of an update (interleaved pipelines)
    equal_lengths: bool = False  # all microbatches of an update have the same B and S (pipelines)

    @property
    def sequence_multiple(self) -> int:
        """Every sequence is padded to a multiple of this: it is cut into two chunks for each context-parallel rank."""
        return 2 * self.context_parallel_size if self.context_parallel_size > 1 else 1

    @property
    def length_multiple(self) -> int:
        """S, before it is sliced, is a multiple of this."""
        slices = self.tensor_parallel_size if self.sequence_parallel else 1
        return slices * math.lcm(self.sequence_multiple, self.alignment * self.context_parallel_size)

    @property
    def count_multiple(self) -> int:
        """The number of microbatches of an update, over all ranks, is a multiple of this."""
        return self.data_parallel_size * self.microbatch_multiple


@dataclass(frozen=True)
class Plan:
    """One microbatch before it is filled."""

    rows: tuple[tuple[int, ...], ...]  # B rows of sample indices; an empty row is padding only
    length: int  # S, not sliced


def plan_update(lengths: Sequence[int], layout: Layout, together: int = 1) -> list[list[Plan]]:
    """The microbatches of one update: a list for each data-parallel rank, all lists equally long.

    Args:
        lengths: tokens of each sample of the update, at least one sample.
        together: so many samples, one behind the other, go into the same microbatch (2: the sides of a preference); it
            divides their number, and `layout.micro_batch_size`.
    """
    padded = [round_up(length, layout.sequence_multiple) for length in lengths]
    units = [tuple(range(start, start + together)) for start in range(0, len(lengths), together)]
    return plan_packed(padded, units, layout) if layout.packing else plan_rows(padded, units, layout)


def plan_packed(lengths: Sequence[int], units: Sequence[tuple[int, ...]], layout: Layout) -> list[list[Plan]]:
    """Microbatches of one row with many sequences; largest first and to and fro over the ranks, which evens out their sums."""
    sizes = [sum(lengths[i] for i in unit) for unit in units]
    loads = [(sum(sizes[number] for number in one), one) for one in bins(sizes, layout)]
    loads.sort(key=lambda load: (-load[0], load[1]))
    size = layout.data_parallel_size
    order: list[Plan] = []
    for start in range(0, len(loads), size):
        to_and_fro = 1 if start // size % 2 == 0 else -1
        for load, one in loads[start : start + size][::to_and_fro]:
            needed = loads[0][0] if layout.equal_lengths else load
            row = tuple(i for number in one for i in units[number])
            order.append(Plan((row,), round_up(max(needed, 1), layout.length_multiple)))
    return [order[rank::size] for rank in range(size)]


def plan_rows(lengths: Sequence[int], units: Sequence[tuple[int, ...]], layout: Layout) -> list[list[Plan]]:
    """Microbatches of rows with one sample each, in order, dealt to the ranks in turn.

    No microbatch has more than micro_batch_size samples, and sizes differ by one unit at most: one of few samples next to full
    ones would be padding where B must be equal, and a rank with little to do where it need not.
    """
    together = len(units[0])
    count = round_up(-(-len(lengths) // layout.micro_batch_size), layout.count_multiple)
    order: list[Plan] = []
    for chosen in np.array_split(np.arange(len(units)), count):
        members = [i for number in chosen for i in units[number]]
        among = range(len(lengths)) if layout.equal_lengths else members
        longest = max((lengths[i] for i in among), default=1)
        height = -(-len(units) // count) * together if layout.equal_lengths else max(len(members), 1)
        rows = [(i,) for i in members] + [()] * (height - len(members))
        order.append(Plan(tuple(rows), round_up(longest, layout.length_multiple)))
    return [order[rank :: layout.data_parallel_size] for rank in range(layout.data_parallel_size)]


def bins(lengths: Sequence[int], layout: Layout) -> list[list[int]]:
    """Units that share a packed microbatch; as many bins as all ranks need, empty ones only where units are too few.

    Best fit decreasing says how many bins the capacity asks for. That number is rounded up to what the ranks need, and a
    search for the least capacity that needs no more bins makes them even (MULTIFIT; Coffman, Garey, Johnson 1978). Even
    bins keep the ranks in step, and cost the least padding where lengths must be equal, and the least memory everywhere.
    """
    multiple, longest = layout.length_multiple, max(lengths)
    capacity = max(layout.pack_length // multiple * multiple, round_up(longest, multiple))
    filled = best_fit_decreasing(lengths, capacity)
    count = round_up(len(filled), layout.count_multiple)

    low, high = max(longest, -(-sum(lengths) // count)), capacity
    while low < high:
        middle = (low + high) // 2
        trial = best_fit_decreasing(lengths, middle)
        if len(trial) <= count:
            filled, high = trial, middle
        else:
            low = middle + 1

    while len(filled) < min(count, len(lengths)):  # one long sample sets the capacity, and short ones still lie together
        heaviest = max((one for one in filled if len(one) > 1), key=lambda one: sum(lengths[i] for i in one))
        filled.remove(heaviest)
        filled += [heaviest[::2], heaviest[1::2]]
    return filled + [[]] * (count - len(filled))


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in bins that hold `capacity`: longest first, each into the fullest bin that has room."""
    filled: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (positions left, bin), ascending
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(room, (lengths[i], -1))
        if place < len(room):
            left, number = room.pop(place)
        else:
            left, number = capacity, len(filled)
            filled.append([])
        filled[number].append(i)
        insort(room, (left - lengths[i], number))
    return filled


def round_up(number: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `number`."""
    return -(-number // multiple) * multiple
