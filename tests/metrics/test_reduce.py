"""Reductions over microbatches and ranks. Not here: GPUs, and groups that are not the whole world."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megapsft.metrics.reduce import Reduction
from megapsft.types import Metric

OVER = {"b/mean": "mean", "a/max": "max", "c/min": "min", "d/half": "p50"}
FINE = 0.013  # a quantile is known to so much of itself


def metrics(values):
    values = torch.tensor([values])
    return {"b/mean": Metric(values), "a/max": Metric(values, "max"), "c/min": Metric(values, "min"),
            "d/half": Metric(values, "p50")}  # fmt: skip


def test_over_the_tokens_of_all_microbatches():
    reduction = Reduction(OVER)
    reduction.add(metrics([1.0, 2.0, 3.0]), torch.tensor([[True, True, True]]))
    reduction.add(metrics([-6.0, math.nan, math.inf]), torch.tensor([[True, False, False]]))
    assert reduction.finish() == pytest.approx({"a/max": 3.0, "b/mean": 0.0, "c/min": -6.0, "d/half": 1.0}, rel=FINE)


def test_not_a_mean_of_means():
    reduction = Reduction({"b/mean": "mean"})
    reduction.add({"b/mean": Metric(torch.tensor([[1.0, 1.0, 1.0]]))}, torch.ones(1, 3, dtype=torch.bool))
    reduction.add({"b/mean": Metric(torch.tensor([[5.0]]))}, torch.ones(1, 1, dtype=torch.bool))
    assert reduction.finish() == {"b/mean": 2.0}


def test_nothing_trained_is_zero():
    reduction = Reduction(OVER)
    reduction.add(metrics([math.nan, 2.0]), torch.tensor([[False, False]]))
    assert reduction.finish() == dict.fromkeys(OVER, 0.0)
    assert Reduction(OVER).finish() == dict.fromkeys(OVER, 0.0)
    assert Reduction({}).finish() == {}


def test_a_trained_nan_is_seen():
    reduction = Reduction(OVER)
    reduction.add(metrics([math.nan, 2.0]), torch.tensor([[True, True]]))
    assert all(math.isnan(value) for value in reduction.finish().values())


def test_sums_in_double_precision():
    reduction = Reduction({"b/mean": "mean"})
    for values in ([1e8, 1.0], [-1e8, 1.0]):
        reduction.add({"b/mean": Metric(torch.tensor([values]))}, torch.tensor([[True, True]]))
    assert reduction.finish() == {"b/mean": 0.5}


def test_keeps_no_graph():
    values = torch.ones(1, 2, requires_grad=True)
    reduction = Reduction({"b/mean": "mean"})
    reduction.add({"b/mean": Metric(2 * values)}, torch.ones(1, 2, dtype=torch.bool))
    assert reduction.finish() == {"b/mean": 2.0}


@pytest.mark.parametrize("metric", [{"d/new": Metric(torch.ones(1, 1))}, {"a/max": Metric(torch.ones(1, 1), "mean")}])
def test_what_was_not_announced_is_an_error(metric):
    with pytest.raises(ValueError, match="announced"):
        Reduction(OVER).add(metric, torch.ones(1, 1, dtype=torch.bool))


def reduce_on(rank, world_size, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    reduction = Reduction(OVER)
    if rank == 0:
        reduction.add(metrics([1.0, 2.0, -7.0]), torch.tensor([[True, True, False]]))
    if rank == 1:
        reduction.add(metrics([9.0]), torch.tensor([[True]]))
    torch.save(reduction.finish(dist.group.WORLD), results / f"{rank}.pt")  # rank 2, a stage without a head, adds nothing
    dist.destroy_process_group()


def test_all_ranks_get_the_same_also_one_that_added_nothing(tmp_path):
    mp.spawn(reduce_on, args=(3, tmp_path / "store", tmp_path), nprocs=3)
    for rank in range(3):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found == pytest.approx({"a/max": 9.0, "b/mean": 4.0, "c/min": 1.0, "d/half": 2.0}, rel=FINE)
