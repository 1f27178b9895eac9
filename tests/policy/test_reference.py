"""The frozen reference: that it stays what it was, and that both placements are the same, on real ranks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megapsft.checkpoint.random_init import init_model
from megapsft.objectives.registry import build_objective
from megapsft.policy.constants import with_reference
from megapsft.policy.reference import Copied, Swapped
from megapsft.train.build import build_reference
from megapsft.train.update import update
from megapsft.types import TrainBatch
from tests.ranks import run_ranks
from tests.train.test_update import make_run, shutdown, weights

SPLITS = {
    "1 rank": (1, []),
    "tp2": (2, ["parallel.tensor_model_parallel_size=2"]),
    "pp2": (2, ["parallel.pipeline_model_parallel_size=2"]),
    "zero1": (2, ["parallel.use_distributed_optimizer=true"]),
}


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("split", SPLITS)
def test_swapped_and_copied_are_the_same_and_stay_what_they_were(split, family, tiny_models, tiny_data):
    world, more = SPLITS[split]
    if family == "qwen3_moe" and split == "tp2":
        more = [*more, "parallel.expert_model_parallel_size=2", "parallel.expert_tensor_parallel_size=1"]
    for same_before, same_after, undisturbed, moved, found in run_ranks(world, _placements, tiny_models(family), tiny_data, more):
        assert same_before
        assert same_after
        assert undisturbed
        assert moved
        assert found in ({"ref_logprobs", "ref_hidden"}, set())  # the last stage, the others


def _placements(model, data, more):
    run = make_run(model, data, *more)
    copied = make_run_reference(run, "copy")
    swapped = make_run_reference(run, "swap")
    assert (type(copied), type(swapped)) == (Copied, Swapped)
    objective = build_objective({"name": "sft"})
    (minibatch,) = run.pack(run.source.next_groups(0), objective).minibatches
    before = [fields(run, reference, minibatch) for reference in (copied, swapped)]
    policy = weights(run)
    update(run.policy, objective, run.optimizer, minibatch, 1e-2)
    moved = weights(run)
    after = [fields(run, reference, minibatch) for reference in (copied, swapped)]
    undisturbed = equal(weights(run), moved)
    result = (
        close(*before), equal(before[0], after[0]) and equal(before[1], after[1]), undisturbed,
        run.policy.head() is None or not equal(policy, moved) or not policy, set(before[0]) - {"weight"},
    )  # fmt: skip
    shutdown()
    return result


def make_run_reference(run, placement):
    config = dataclasses.replace(
        run.plan.config, reference=dataclasses.replace(run.plan.config.reference, placement=placement)
    )
    return build_reference(dataclasses.replace(run.plan, config=config), run.policy)


def fields(run, reference, minibatch):
    """What the reference says of the first microbatch, and its output weight."""
    done = with_reference(run.policy, reference, minibatch, frozenset({"ref_logprobs", "ref_hidden"})).microbatches[0]
    found = {name: getattr(done, name) for name in ("ref_logprobs", "ref_hidden")}
    weight = reference.output_weight(run.policy)
    found["weight"] = None if weight is None else weight.clone()
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def close(a, b):
    """But for rounding: products round by where their operands lie in memory."""
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=1e-5, atol=1e-5) for name in a)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_reference_from_another_folder_leaves_the_policy_as_it_was(tiny_models, tiny_data, tmp_path):
    other = tmp_path / "other"
    init_model(family="qwen3", data_path=tiny_data, out_dir=other, vocab_size=307, hidden_size=64, intermediate_size=128, seed=2)
    for same_policy, other_reference in run_ranks(1, _other, tiny_models("qwen3"), tiny_data, other):
        assert same_policy
        assert other_reference


def _other(model, data, other):
    run = make_run(model, data, "objective.name=iw_sft", f"reference.path={other}")
    before = weights(run)
    reference = build_reference(run.plan, run.policy)
    same_policy = equal(before, weights(run))
    with reference.in_place_of(run.policy):
        there = weights(run)
    shutdown()
    return same_policy, not equal(before, there)


def test_precomputed_log_probabilities_need_no_reference(tiny_models, tiny_data):
    """Rows that bring them are believed: the pass leaves them alone."""
    assert run_ranks(1, _precomputed, tiny_models("qwen3"), tiny_data) == [True]


def _precomputed(model, data):
    run = make_run(model, data)
    reference = build_reference(run.plan, run.policy)
    (minibatch,) = run.pack(run.source.next_groups(0), build_objective({"name": "sft"})).minibatches
    given = tuple(dataclasses.replace(m, ref_logprobs=torch.full(m.loss_mask.shape, -3.0)) for m in minibatch.microbatches)
    batch = TrainBatch(minibatches=(dataclasses.replace(minibatch, microbatches=given),))
    done = with_reference(run.policy, reference, batch.minibatches[0], frozenset({"ref_logprobs"}))
    same = all((m.ref_logprobs == -3.0).all() for m in done.microbatches)
    shutdown()
    return bool(same)
