"""One update on real ranks: what is skipped, what is selected, what bf16 keeps."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
import torch

from megapsft.checkpoint.hf import export_stream, import_hf
from megapsft.checkpoint.optimizer_state import adam_step
from megapsft.config import load_config
from megapsft.objectives.registry import build_objective
from megapsft.parallel import initialize, shutdown
from megapsft.policy.constants import with_old_policy
from megapsft.train.build import build_policy
from megapsft.train.optimizer import build_optimizer
from megapsft.train.plan import plan_run
from megapsft.train.prepare import with_constants
from megapsft.train.run import Run
from megapsft.train.update import update
from tests.invariants.measure import whole_gradient
from tests.ranks import run_ranks


def make_run(model, data, *more) -> Run:
    """A run on this rank that writes nothing."""
    options = [
        f"model.path={model}", f"data.path={data}", "data.columns.prompt=question", "data.columns.demonstration=answer",
        "model.dtype=float32", "train.batch_size=8", "data.pack_length=512", *more,
    ]  # fmt: skip
    config = load_config(None, options)
    plan = plan_run(config, int(os.environ["WORLD_SIZE"]))
    initialize(plan.mesh, config.parallel, seed=1)
    policy = build_policy(plan)
    return Run(plan, policy, build_optimizer(config.optimizer, config.parallel, policy), None, plan.rows)


def weights(run: Run) -> dict[str, torch.Tensor]:
    stream = export_stream(run.policy.gpt_models(), run.plan.hf)
    return {name: tensor.clone() for name, tensor in stream if tensor is not None}


@pytest.mark.parametrize("world", [1, 2])
def test_an_update_without_trained_tokens_changes_nothing(world, tiny_models, tiny_data):
    for report, same, steps in run_ranks(world, _all_masked, tiny_models("qwen3"), tiny_data):
        assert report.skipped == "no token is trained"
        assert report.metrics["train/loss"] == report.metrics["train/grad_norm"] == 0.0
        assert all(np.isfinite(value) for value in report.metrics.values())
        assert same
        assert steps == 1


def _all_masked(model, data):
    run = make_run(model, data)
    objective = build_objective({"name": "psft"})
    groups = run.source.next_groups(0)
    (minibatch,) = run.pack(groups, objective).minibatches
    assert update(run.policy, objective, run.optimizer, minibatch, 1e-3).skipped is None  # moments are there now
    before = weights(run)
    masked = [(dataclasses.replace(s, loss_mask=np.zeros_like(s.loss_mask)),) for (s,) in groups]
    (minibatch,) = run.pack(masked, objective).minibatches
    report = update(run.policy, objective, run.optimizer, minibatch, 1e-3)
    after = weights(run)
    same, steps = all(torch.equal(before[name], after[name]) for name in before), adam_step(run.optimizer)
    shutdown()
    return report, same, steps


SELECTED = {"name": "psft", "entropy_threshold": 5.0, "entropy_denominator": "selected"}


@pytest.mark.parametrize(("world", "more"), [(2, []), (2, ["parallel.pipeline_model_parallel_size=2"]),
                                             (2, ["parallel.tensor_model_parallel_size=2"])])  # fmt: skip
def test_selected_tokens_are_counted_over_all_ranks(world, more, tiny_models, tiny_data):
    """Loss is -1 whatever is selected: the mean of ratios of 1 over the selected tokens; gradients are those of one rank."""
    alone = run_ranks(1, _selected, tiny_models("qwen3"), tiny_data, [])[0]
    assert 0 < alone[2] < 1, "some tokens are selected, and not all"
    for loss, gradient, _ in run_ranks(world, _selected, tiny_models("qwen3"), tiny_data, more):
        assert loss == pytest.approx(-1.0, rel=1e-5)
        for name, tensor in gradient.items():
            assert float((tensor - alone[1][name]).norm() / alone[1][name].norm()) < 1e-5, name


def _selected(model, data, more):
    run = make_run(model, data, *more)
    objective = build_objective(SELECTED)
    batch = run.pack(run.source.next_groups(0), objective)
    # a flat random model is unsure of everything: without the scaling no threshold would tell tokens apart
    with torch.no_grad():
        for gpt in run.policy.gpt_models():
            for parameter in gpt.parameters():
                parameter.mul_(6.0 if parameter.dim() > 1 else 1.0)
    (minibatch,) = with_constants(run.policy, None, batch, objective).minibatches
    chosen = 0.5
    if run.policy.head() is not None:
        picked = sum(objective.totals(m)["selected"] for m in minibatch.microbatches)
        chosen = float(picked / torch.cat([m.loss_mask.flatten() for m in minibatch.microbatches]).sum())
    report = update(run.policy, objective, run.optimizer, minibatch, 0.0)
    result = report.metrics["train/loss"], whole_gradient(run.policy), chosen
    shutdown()
    return result


def test_bf16_old_policy_pass_has_the_bits_of_the_training_pass(tiny_models, tiny_data):
    for metrics in run_ranks(2, _bf16_ratio, tiny_models("qwen3_moe"), tiny_data):
        assert metrics["objective/ratio_max"] == metrics["objective/ratio_min"] == 1.0


def _bf16_ratio(model, data):
    run = make_run(model, data, "model.dtype=bfloat16", "parallel.tensor_model_parallel_size=2")
    objective = build_objective({"name": "psft"})
    import_hf(run.policy.gpt_models(), model, run.plan.hf)
    (minibatch,) = run.pack(run.source.next_groups(0), objective).minibatches
    minibatch = with_old_policy(run.policy, minibatch)
    metrics = update(run.policy, objective, run.optimizer, minibatch, 0.0).metrics
    shutdown()
    return metrics
