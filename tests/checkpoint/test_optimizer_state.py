"""Parameters out of main parameters. Not here: that states are saved and loaded (test_dist.py), and FP8 itself (tests/gpu)."""

from __future__ import annotations

import os

import torch

from megapsft.checkpoint.optimizer_state import round_again
from megapsft.config import load_config
from megapsft.parallel import initialize, shutdown
from megapsft.train.build import build_policy
from megapsft.train.optimizer import build_optimizer
from megapsft.train.plan import plan_run
from tests.ranks import run_ranks


def lost_and_found(model, data, gather) -> bool:
    """Runs on every rank: whether parameters that were overwritten come back, to the bit, from shards of main parameters."""
    config = load_config(None, [
        f"model.path={model}", f"data.path={data}", "data.columns.prompt=question", "data.columns.demonstration=answer",
        "parallel.use_distributed_optimizer=true", "parallel.overlap_grad_reduce=true", f"parallel.overlap_param_gather={gather}",
        "train.batch_size=8",
    ])  # fmt: skip
    plan = plan_run(config, int(os.environ["WORLD_SIZE"]))
    initialize(plan.mesh, plan.config.parallel, seed=1)
    policy = build_policy(plan)
    optimizer = build_optimizer(plan.config.optimizer, plan.config.parallel, policy)
    parameters = [parameter for chunk in policy.chunks for parameter in chunk.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(7.0)
    round_again(optimizer, policy.chunks)
    same = all(torch.equal(parameter, kept) for parameter, kept in zip(parameters, before, strict=True))
    shutdown()
    return same


def test_parameters_are_made_again_from_the_shards_of_main_parameters(tiny_models, tiny_data):
    for gather in ("false", "true"):
        assert run_ranks(2, lost_and_found, tiny_models("qwen3"), tiny_data, gather) == [True, True]
