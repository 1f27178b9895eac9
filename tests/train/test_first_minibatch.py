"""The first minibatch of a step is its own old policy: every ratio is exactly 1, and no pass is made to find that out.

For every objective that has an old policy, and for options that must know it beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from megapsft.config import load_config
from megapsft.data.arithmetic import generate, rollouts, write_jsonl
from megapsft.objectives.registry import build_objective, objective_names
from megapsft.parallel import initialize, shutdown
from megapsft.train.optimizer import build_optimizer
from megapsft.train.phases import has_old_policy
from megapsft.train.plan import plan_run
from megapsft.train.prepare import with_advantages, with_constants
from megapsft.train.run import Run, build_critic, build_policy, build_reference
from megapsft.train.update import update
from tests.ranks import run_ranks

REQUIRED = {"dr_grpo": ("objective.max_response_length=512",)}
BEFOREHAND = {  # what is counted from the old policy before the first update
    "psft over selected tokens": ("psft", "objective.entropy_threshold=5.0", "objective.entropy_denominator=selected"),
    "ppo with a KL in the reward": ("ppo", "objective.reward_kl_coef=0.1"),
}
CASES = {
    name: (name, *REQUIRED.get(name, ()))
    for name in objective_names()
    if has_old_policy(build_objective({"name": name} | ({"max_response_length": 512} if name in REQUIRED else {})))
} | BEFOREHAND


@dataclass(frozen=True)
class Step:
    """What a step of two updates did."""

    passes: int  # forward passes without gradient before the first update, of one microbatch each
    microbatches: tuple[int, ...]  # of each update
    has_reference: bool
    ratios: tuple[dict[str, float], ...]  # smallest and largest of each update


@pytest.fixture(scope="module")
def steps(tiny_models, tmp_path_factory) -> dict[str, Step]:
    data = tmp_path_factory.mktemp("old policy") / "rollouts.jsonl"
    write_jsonl(data, rollouts(generate(8, 0), 0, 3))
    return run_ranks(1, _steps, tiny_models("qwen3"), data)[0]


def _steps(model, data) -> dict[str, Step]:
    found, policy, counted = {}, None, []
    for case, (name, *options) in CASES.items():
        config = load_config(
            None,
            [
                f"model.path={model}", f"data.path={data}", "data.kind=rollouts", f"objective.name={name}", *options,
                "model.dtype=bfloat16", "train.batch_size=4", "train.minibatch_size=2", "data.pack_length=512",
            ],
        )  # fmt: skip
        plan = plan_run(config, 1)
        if policy is None:
            initialize(plan.mesh, config.parallel, seed=1)
            policy = build_policy(plan)
            optimizer = build_optimizer(config.optimizer, config.parallel, policy)
            policy.gpt_models()[0].register_forward_pre_hook(lambda *_: counted.append(torch.is_grad_enabled()))
        run, phase = Run(plan, policy, optimizer, None, plan.rows, None, None), plan.phases[-1]
        reference = build_reference(plan, policy) if plan.needs_reference(phase) else None
        batch = run.pack(with_advantages(plan.rows.next_groups(0), phase.objective), phase.objective)
        counted.clear()
        batch = with_constants(policy, reference, batch, phase.objective)
        passes = counted.count(False)
        if phase.objective.critic:
            batch = build_critic(plan).with_values(batch, phase.objective)
        reports = [update(policy, phase.objective, optimizer, one, 1e-2, reference) for one in batch.minibatches]
        ends = ("ratio_min", "ratio_max")
        ratios = [{k: v for k, v in report.metrics.items() if k.endswith(ends)} for report in reports]
        sizes = tuple(len(minibatch.microbatches) for minibatch in batch.minibatches)
        found[case] = Step(passes, sizes, reference is not None, tuple(ratios))
    shutdown()
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_first_ratios_are_1_and_cost_nothing(case, steps):
    step = steps[case]
    first, second = step.ratios
    assert set(first.values()) == {1.0}
    assert set(second.values()) != {1.0}  # the weights have moved
    old = sum(step.microbatches) if case in BEFOREHAND else step.microbatches[1]
    assert step.passes == old + (sum(step.microbatches) if step.has_reference else 0)
    assert step.microbatches[0] > 1


def test_the_objectives_that_are_meant(steps):
    assert {"psft", "grpo", "dapo", "dr_grpo", "gspo", "cispo", "ppo", "luffy", "hpt"} <= set(steps)
