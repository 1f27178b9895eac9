"""Several packs as one, without gradient: the numbers of the packs one by one, on real ranks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megapsft.objectives.registry import build_objective
from megapsft.policy.constants import with_old_policy
from megapsft.policy.forward import evaluate
from megapsft.policy.merge import merge
from tests.ranks import run_ranks
from tests.train.test_update import make_run, shutdown

SPLITS = {
    "1 rank": (1, []),
    "tp2+sp": (2, ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]),
    "cp2": (2, ["parallel.context_parallel_size=2"]),
    "pp2": (2, ["parallel.pipeline_model_parallel_size=2"]),
    "pp2+vpp2": (2, ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"]),
    "dp2": (2, []),
}


@pytest.mark.parametrize("split", SPLITS)
def test_merged_packs_give_the_numbers_of_single_ones(split, tiny_models, tiny_data):
    world, more = SPLITS[split]
    sizes = set()
    for size, close, same_routing in run_ranks(world, _merged, tiny_models("qwen3_moe"), tiny_data, more):
        sizes.add(size)
        assert close
        assert same_routing
    assert sizes == {2 if split == "pp2+vpp2" else 4}


def _merged(model, data, more):
    options = ["data.pack_length=64", "train.batch_size=32", "model.moe_routing_replay=true"]
    run = make_run(model, data, *options, *more)
    (minibatch,) = run.pack(run.source.next_groups(0), build_objective({"name": "psft"})).minibatches
    minibatch = first(minibatch, 4)
    alone, together = (evaluate(run.policy, minibatch, at_once=size) for size in (1, 4))
    close = all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(alone, together, strict=True))
    records = [[], []]
    for size, record in zip((1, 4), records, strict=True):
        evaluate(run.policy, minibatch, at_once=size, routing=record)
    same = [a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(*records, strict=True)]
    size = merge(minibatch, 4, run.plan.mesh.pp if run.plan.mesh.vpp > 1 else 1)[1]
    shutdown()
    return size, close, all(same)


def first(minibatch, count):
    """Its first microbatches; of four, an interleaved pipeline of two stages has to keep two."""
    return dataclasses.replace(minibatch, microbatches=minibatch.microbatches[:count])


def test_rows_are_left_alone(tiny_models, tiny_data):
    assert run_ranks(1, _rows, tiny_models("qwen3"), tiny_data) == [1]


def _rows(model, data):
    run = make_run(model, data, "data.packing=false", "train.no_grad_microbatches=4")
    (minibatch,) = run.pack(run.source.next_groups(0), build_objective({"name": "psft"})).minibatches
    with_old_policy(run.policy, minibatch)
    size = merge(minibatch, 4, 1)[1]
    shutdown()
    return size
