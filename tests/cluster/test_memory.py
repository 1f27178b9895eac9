"""Bytes that are planned, compared with those that real ranks allocate for parameters, gradients and optimizer.

Not here: activations, buffers of communication and the runtime's share, which exist on a GPU only; they are documented estimates.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import pytest
import torch
from megatron.core import parallel_state

from megapsft.checkpoint.random_init import init_model
from megapsft.cluster.memory import Held, held_by_policy
from megapsft.config import load_config
from megapsft.parallel import initialize, shutdown
from megapsft.train.build import build_policy
from megapsft.train.optimizer import build_optimizer
from megapsft.train.plan import plan_run
from megapsft.train.run import Run
from megapsft.train.update import update
from tests.invariants.splits import NAMES
from tests.ranks import run_ranks

SPLITS = [  # family, dtype, ranks, split
    ("qwen3", "float32", 1, {}),
    ("qwen2", "bfloat16", 2, {"tp": 2}),
    ("qwen3", "float32", 2, {"pp": 2}),
    ("qwen3", "bfloat16", 2, {"pp": 2, "vpp": 2}),
    ("qwen3", "bfloat16", 4, {"tp": 2, "pp": 2}),
    ("llama", "bfloat16", 2, {"zero1": True}),
    ("qwen3", "float32", 2, {"zero1": True, "cp": 2}),
    ("qwen3", "bfloat16", 4, {"pp": 2, "zero1": True}),
    ("qwen3_moe", "bfloat16", 2, {}),
    ("qwen3_moe", "bfloat16", 2, {"ep": 2}),
    ("qwen3_moe", "float32", 2, {"ep": 2, "zero1": True}),
    ("qwen3_moe", "bfloat16", 2, {"tp": 2, "ep": 2, "etp": 1, "zero1": True}),
    ("qwen3_moe", "bfloat16", 4, {"pp": 2, "ep": 2}),
    ("qwen3_moe", "bfloat16", 4, {"ep": 2, "zero1": True}),
    ("qwen3", "bfloat16", 2, {"tp": 2, "rank": 4}),
    ("qwen3_moe", "bfloat16", 2, {"pp": 2, "rank": 4}),
    ("qwen3_moe", "float32", 2, {"tp": 2, "ep": 2, "etp": 1, "zero1": True, "rank": 16}),
]


@pytest.mark.parametrize(("family", "dtype", "world", "split"), SPLITS, ids=lambda value: str(value).replace("'", ""))
def test_what_is_planned_is_what_ranks_allocate(family, dtype, world, split, tiny_models, tiny_data):
    options = [f"{NAMES[name]}={str(value).lower()}" for name, value in split.items()]
    here = [f"model.path={tiny_models(family)}", f"data.path={tiny_data}", f"model.dtype={dtype}", *options]
    for stage, found, planned in run_ranks(world, _allocate, here):
        for kind in ("parameters", "gradients", "optimizer"):
            expected = getattr(planned, kind)
            assert getattr(found, kind) == pytest.approx(expected, rel=0.01), f"{kind} of stage {stage}"
        if not split.get("zero1"):  # no padding: to the byte
            assert found == planned


@pytest.mark.parametrize("stages", [1, 2])
def test_tied_embeddings_are_on_the_first_stage_and_on_the_last(stages, tiny_data, tmp_path):
    sizes = dict(vocab_size=307, hidden_size=64, head_dim=24, intermediate_size=128)
    model = init_model(family="qwen3", data_path=tiny_data, out_dir=tmp_path / "tied", tie_word_embeddings=True, seed=1, **sizes)
    here = [f"model.path={model}", f"data.path={tiny_data}", f"{NAMES['pp']}={stages}"]
    for _, found, planned in run_ranks(stages, _allocate, here):
        assert found == planned


def _allocate(options: list[str]) -> tuple[int, Held, Held]:
    """After one update: the stage of this rank, what it holds, and what was planned for it."""
    columns = ["data.columns.prompt=question", "data.columns.demonstration=answer"]
    config = load_config(None, [*columns, "objective.name=sft", "train.batch_size=4", "optimizer.lr=1e-4", *options])
    plan = plan_run(config, int(os.environ["WORLD_SIZE"]))
    initialize(plan.mesh, config.parallel, seed=1)
    policy = build_policy(plan)
    optimizer = build_optimizer(config.optimizer, config.parallel, policy)
    run = Run(plan, policy, optimizer, None, plan.rows)
    objective = plan.phases[0].objective
    (minibatch,) = run.pack(plan.rows.next_groups(0), objective).minibatches
    assert update(policy, objective, optimizer, minibatch, lr=1e-4).skipped is None

    weights = storages(p.data for chunk in policy.chunks for p in chunk.parameters())
    buffers = [b for chunk in policy.chunks for b in chunk.buffers + chunk.expert_parallel_buffers]
    parts = [part.optimizer for part in optimizer.chained_optimizers if not part.is_stub_optimizer]
    state = [x for part in parts for one in part.state.values() for x in one.values() if isinstance(x, torch.Tensor) and x.dim()]
    main = [p.data for part in parts for group in part.param_groups for p in group["params"]]
    found = Held(
        parameters=sum(weights.values()),
        gradients=sum(storages(b.grad_data for b in buffers).values()),
        optimizer=sum(size for at, size in storages([*state, *main]).items() if at not in weights),
    )
    stage = parallel_state.get_pipeline_model_parallel_rank()
    planned = held_by_policy(config, plan.hf, plan.mesh, stage)
    shutdown()
    return stage, found, planned


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes by address: views of one storage count once, and whole."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
