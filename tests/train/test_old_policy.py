"""The first minibatch of a step takes its old policy from the training pass itself, whatever the objective.

Where something is summed up of the old policy before the update, there is a pass before it after all.
"""

from __future__ import annotations

import dataclasses

import pytest

from megapsft.data.arithmetic import generate, rollouts, write_jsonl
from megapsft.objectives.registry import build_objective, objective_names
from megapsft.parallel import initialize
from megapsft.policy.reference import Swapped
from megapsft.train.build import build_policy
from megapsft.train.optimizer import build_optimizer
from megapsft.train.phases import has_old_policy
from megapsft.train.prepare import with_constants
from megapsft.train.run import Run
from megapsft.train.update import update
from megapsft.types import TrainBatch
from tests.invariants.objectives import make_plan, prepare
from tests.objectives.test_contract import variants
from tests.ranks import run_ranks
from tests.train.test_update import shutdown

SECTIONS = [{"name": name} | variants(name)[0] for name in objective_names()]
SUMMED = [{"name": "psft", "entropy_threshold": 5.0, "entropy_denominator": "selected"}, {"name": "ppo", "reward_kl_coef": 0.1}]
WITH_OLD = [section for section in SECTIONS + SUMMED if has_old_policy(build_objective(section))]
REPLAY = ["model.moe_routing_replay=true"]


@pytest.mark.parametrize(("family", "more", "sections"), [("qwen3", [], WITH_OLD), ("qwen3_moe", REPLAY, [{"name": "psft"}])])
def test_its_own_pass_has_the_bits_of_one_before_it(family, more, sections, tiny_models, tmp_path):
    path = tmp_path / "rollouts.jsonl"
    write_jsonl(path, rollouts(generate(8, 7), seed=0, each=1))
    (found,) = run_ranks(1, compare, tiny_models(family), path, more, sections)
    assert len(WITH_OLD) > 10
    for section, (beforehand, own, explicit) in zip(sections, found, strict=True):
        assert beforehand == (section in SUMMED), section
        assert own == explicit, section


def compare(model, path, more, sections):
    """Of each objective: whether the first minibatch was given an old policy, and the metrics with its own and with another."""
    plan = make_plan(model, path, "rollouts", ("data.pack_length=256", *more))
    initialize(plan.mesh, plan.config.parallel, seed=1)
    policy = build_policy(plan)
    optimizer = build_optimizer(plan.config.optimizer, plan.config.parallel, policy)
    reference, results = Swapped(), []
    reference.take(policy)
    for section in sections:
        objective = build_objective(section)
        run = Run(plan, policy, optimizer, None, plan.rows, reference=reference)
        run, batch = prepare(run, objective)  # with an old policy of a pass of its own
        (explicit,) = batch.minibatches
        bare = tuple(
            dataclasses.replace(m, old_logprobs=None, old_entropy=None, routing=None, ref_logprobs=None, ref_hidden=None)
            for m in explicit.microbatches
        )
        first = TrainBatch(minibatches=(dataclasses.replace(explicit, microbatches=bare),))
        (own,) = with_constants(policy, reference, first, objective).minibatches
        reports = [update(policy, objective, optimizer, minibatch, 0.0, reference) for minibatch in (own, explicit)]
        results.append((own.microbatches[0].old_logprobs is not None, *(report.metrics for report in reports)))
    shutdown()
    return results
