"""Memory that a process has taken. Not here: on a GPU, where torch counts."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megapsft.platform.memory import memory_of_fullest_rank, most_memory
from tests.ranks import run_ranks

LARGE = 256 * 2**20


def _taken_by_the_second_rank() -> tuple[int, int, int]:
    dist.init_process_group("gloo")
    before = most_memory()
    if dist.get_rank() == 1:
        torch.ones(before + LARGE, dtype=torch.uint8)  # gone again; what was held at most stays
    found = before, most_memory(), memory_of_fullest_rank(torch.device("cpu"))
    dist.destroy_process_group()
    return found


def test_it_is_that_of_the_rank_that_took_most_though_it_gave_it_back():
    (_, first, told_first), (before, second, told_second) = run_ranks(2, _taken_by_the_second_rank)
    assert second >= before + LARGE
    assert second > first
    assert told_first == told_second == second
