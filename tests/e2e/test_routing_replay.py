"""Experts that a real SGLang server chose, chosen again by the policy: what it sampled is then as probable as the server said.

In bfloat16, where the two choose other experts now and then. Not here: that each rank takes its own tokens and layers
(tests/models/test_router.py).
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megapsft.config import load_config
from megapsft.data.arithmetic import generate, write_jsonl
from megapsft.errors import TrainingStopped
from megapsft.objectives.registry import build_objective
from megapsft.parallel import initialize, shutdown
from megapsft.policy.constants import without_routing
from megapsft.policy.forward import evaluate, read
from megapsft.train.build import build_policy
from megapsft.train.engines import open_engine
from megapsft.train.plan import plan_run
from megapsft.train.run import Run
from megapsft.train.sampled import Sampled
from tests.invariants.compare import perturbed
from tests.ranks import run_ranks
from tests.shipped import FOLDER

pytestmark = pytest.mark.servers

CONFIG = FOLDER / "grpo/tiny-qwen3-arithmetic.yaml"
REPLAY = "model.moe_routing_replay=rollout"


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("replay")
    write_jsonl(folder / "sums.jsonl", generate(32, 3, "easy"))
    model = perturbed(folder, "moe", folder / "sums.jsonl", names=("model",))["model"]
    return [f"model.path={model}", f"data.path={folder / 'sums.jsonl'}"]


def test_replay_takes_the_servers_experts_out_of_the_mismatch(paths, tmp_path):
    split = ["parallel.tensor_model_parallel_size=2"]
    (free, replayed, routed, demonstrations), other = run_ranks(2, sample, tmp_path, [*paths, *split, REPLAY])
    assert other[2] > 0
    assert routed > 500, "tokens of rollouts"
    assert demonstrations > 0, "which the server did not route"
    assert replayed["k3"] < 0.3 * free["k3"]
    assert replayed["max"] < 0.5 * free["max"]


def sample(folder: Path, options: list[str]):
    """On a rank: mismatch of the tokens that a server sampled, with its experts and with others; and how many there are."""
    few = ["train.batch_size=8", "train.minibatch_size=8", "rollout.n=4", "rollout.max_tokens=32", f"run.dir={folder}"]
    server = ["rollout.engine=sglang", "rollout.server_args=[--max-total-tokens, '4096']", "model.dtype=bfloat16"]
    plan = plan_run(load_config(CONFIG, [*few, *server, *options]), int(os.environ["WORLD_SIZE"]))
    initialize(plan.mesh, plan.config.parallel, seed=1)
    policy = build_policy(plan)
    source = Sampled(plan.config, plan.data, plan.template, open_engine(plan, policy), {})
    try:
        groups = source.next_groups(0)
        refuses_what_lacks_routing(source)
    finally:
        source.close()
    run = Run(plan, policy, None, None, source)
    (minibatch,) = run.pack(groups, build_objective(plan.config.objective)).minibatches
    found = [mismatch(minibatch, evaluate(policy, one)) for one in (without_routing(minibatch), minibatch)]
    routed = sum(int((m.rollout_routing[..., 0, 0] >= 0).sum()) for m in minibatch.microbatches)
    demonstrations = sum(int(m.demonstration.sum()) for m in minibatch.microbatches)
    dist.barrier()
    shutdown()
    return (*found, routed, demonstrations)


def mismatch(minibatch, outputs) -> dict[str, float]:
    """Of `rollout/mismatch_*`, over the rollouts of this rank."""
    differences = []
    for microbatch, output in zip(minibatch.microbatches, outputs, strict=True):
        where = microbatch.loss_mask & ~microbatch.demonstration
        differences.append((read(output).logprobs - microbatch.rollout_logprobs)[where].double())
    d = torch.cat(differences)
    return {"k3": float((torch.expm1(d) - d).mean()), "max": float(d.abs().max())}


def refuses_what_lacks_routing(source) -> None:
    """Of a server that was started anew without it, say."""
    for answered in source.ahead.answered[:1]:  # on the rank that asks
        for wrong in (None, answered.rollouts[0].routed_experts[:-1]):
            with pytest.raises(TrainingStopped, match="--enable-return-routed-experts"):
                source._routed_experts(dataclasses.replace(answered.rollouts[0], routed_experts=wrong))
