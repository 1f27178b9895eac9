"""Loss, gradient and metrics of one update of every objective, on the ranks of a split, by the code that trains."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megapsft.checkpoint.hf import import_hf
from megapsft.config import load_config
from megapsft.objectives.registry import build_objective
from megapsft.parallel import initialize, shutdown
from megapsft.policy.constants import with_old_policy
from megapsft.policy.reference import Swapped
from megapsft.train.build import build_critic, build_policy
from megapsft.train.optimizer import build_optimizer
from megapsft.train.plan import RunPlan, plan_run
from megapsft.train.prepare import with_advantages, with_constants
from megapsft.train.run import Run
from megapsft.train.update import update
from megapsft.types import Objective, Sample, TrainBatch
from tests.invariants.measure import CLIP, whole_gradient

PROMPTS = {"rollouts": 6, "preferences": 8}


def measure_objectives(
    models: dict[str, Path], data: dict[str, Path], options: tuple[str, ...], sections: list[dict]
) -> list[dict[str, Any]]:
    """For each config section `objective`: `metrics` of the update, and on rank 0 `gradient`.

    The old policy has the weights of models["old"], the reference those of models["ref"], the trained one those of
    models["new"]; rollouts have made-up log-probabilities of the engine that sampled them. Nothing is updated: lr 0.
    """
    plans = {kind: make_plan(models["old"], path, kind, options) for kind, path in data.items()}
    plan = plans["rollouts"]
    initialize(plan.mesh, plan.config.parallel, seed=1)
    policy = build_policy(plan)
    optimizer = build_optimizer(plan.config.optimizer, plan.config.parallel, policy)
    reference = Swapped()
    import_hf(policy.gpt_models(), models["ref"], plan.hf)
    reference.take(policy)
    objectives = [build_objective(section) for section in sections]
    import_hf(policy.gpt_models(), models["old"], plan.hf)
    prepared = []
    for objective in objectives:
        kind = "preferences" if "preferences" in objective.trains_on else "rollouts"
        run = Run(plans[kind], policy, optimizer, None, plans[kind].rows, reference=reference)
        prepared.append(prepare(run, objective))
    import_hf(policy.gpt_models(), models["new"], plan.hf)
    results = []
    for section, objective, (run, batch) in zip(sections, objectives, prepared, strict=True):
        (minibatch,) = batch.minibatches
        report = update(policy, objective, optimizer, minibatch, 0.0, reference)
        gradient = whole_gradient(policy)
        if run.critic:
            report = run.critic.update(objective, minibatch, report)
        assert report.skipped is None, (section, report.skipped)
        results.append({"metrics": report.metrics, "gradient": gradient})
    shutdown()
    return results


def make_plan(model: Path, path: Path, kind: str, options: tuple[str, ...]) -> RunPlan:
    """Of a run on this file; its own objective is not used."""
    name = {"rollouts": "psft", "preferences": "dpo"}[kind]
    config = load_config(
        None,
        [
            f"objective.name={name}", f"model.path={model}", f"data.path={path}", f"data.kind={kind}", "model.dtype=float32",
            "model.make_vocab_size_divisible_by=16", f"train.batch_size={PROMPTS[kind]}", f"optimizer.clip_grad={CLIP}",
            "optimizer.weight_decay=0", "critic.lr=0" if name == "ppo" else "train.seed=1", *options,
        ],
    )  # fmt: skip
    return plan_run(config, int(os.environ["WORLD_SIZE"]))


def prepare(run: Run, objective: Objective) -> tuple[Run, TrainBatch]:
    """What the loop does before the updates of a step, with an old policy for the first of them as well."""
    groups = [tuple(with_rollout_logprobs(sample) for sample in group) for group in run.source.next_groups(0)]
    batch = run.pack(with_advantages(groups, objective), objective)
    batch = TrainBatch(minibatches=tuple(with_old_policy(run.policy, minibatch) for minibatch in batch.minibatches))
    batch = with_constants(run.policy, run.reference, batch, objective)
    if objective.critic:
        critic = build_critic(run.plan)
        if critic.policy.head() is not None:
            torch.manual_seed(4)  # a head of zeros would leave the values, and most gradients, at zero
            with torch.no_grad():
                critic.policy.head().weight.normal_(std=0.1)
        critic.optimizer.reload_model_params()
        run = dataclasses.replace(run, critic=dataclasses.replace(critic, lr=0.0))
        batch = run.critic.with_values(batch, objective)
    return run, batch


def with_rollout_logprobs(sample: Sample) -> Sample:
    """As if an engine had sampled it."""
    noise = np.random.default_rng(sample.token_ids.astype(np.int64)).normal(size=len(sample))
    return dataclasses.replace(sample, rollout_logprobs=(sample.loss_mask * (-4 + noise)).astype(np.float32))


def difference(ours: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Relative differences: of every tensor of the gradient, |g - g1| / |g1|, and of every metric but times."""
    assert ours["gradient"].keys() == expected["gradient"].keys()
    found = {
        name: float((ours["gradient"][name] - g).double().norm() / max(float(g.double().norm()), 1e-12))
        for name, g in expected["gradient"].items()
    }
    for key, value in expected["metrics"].items():
        found[key] = abs(ours["metrics"][key] - value) / max(abs(value), 1e-2)
    return found
