"""Loss and whole gradient of one update, measured on the ranks of a split by the code that trains."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megapsft.checkpoint.hf import fill, import_hf
from megapsft.checkpoint.weights import rows_of
from megapsft.checkpoint.weights.live import LiveWeights
from megapsft.config import load_config
from megapsft.models.adapters import trained_rules
from megapsft.models.parameters import Rule
from megapsft.objectives.registry import build_objective
from megapsft.parallel import initialize, shutdown
from megapsft.policy.build import Policy
from megapsft.policy.constants import with_old_policy
from megapsft.train.build import build_policy
from megapsft.train.optimizer import build_optimizer
from megapsft.train.plan import plan_run
from megapsft.train.run import Run
from megapsft.train.update import update

OBJECTIVES = {"sft": {"name": "sft"}, "psft": {"name": "psft", "clip_high": 0.28}}
CLIP = 1e9  # gradients as they are


def measure(old: Path, new: Path, data: Path, options: tuple[str, ...], samples: int) -> dict[str, dict]:
    """By objective: `metrics` of the update; on rank 0 `gradient`, whole tensors by their Hugging Face names, and `bitwise`,
    whether what was exported before the update is what had been imported.

    The old policy has the weights of `old`, the trained one those of `new`, so that ratios are not 1. Nothing is updated: lr 0.
    """
    config = load_config(
        None,
        [
            f"model.path={old}", f"data.path={data}", "data.columns.prompt=question", "data.columns.demonstration=answer",
            "model.dtype=float32", "model.make_vocab_size_divisible_by=16", f"train.batch_size={samples}",
            f"optimizer.clip_grad={CLIP}", "optimizer.weight_decay=0", *options,
        ],
    )  # fmt: skip
    plan = plan_run(config, int(os.environ["WORLD_SIZE"]))
    initialize(plan.mesh, config.parallel, seed=1)
    policy = build_policy(plan)
    rules = trained_rules(plan.hf, config.lora) or plan.family.parameters(plan.hf)
    if config.lora.rank is not None:  # with B zero, as it is at first, A would have no gradient
        shapes = {rule.hf: rule.shape for rule in rules}
        fill(policy.chunks, lambda name, index: random(name, shapes[name])[index], plan.hf, rules)
    optimizer = build_optimizer(config.optimizer, config.parallel, policy)
    run = Run(plan, policy, optimizer, None, plan.rows)
    results = {}
    for name, section in OBJECTIVES.items():
        objective = build_objective(section)
        import_hf(policy.gpt_models(), old, plan.hf)
        (minibatch,) = run.pack(plan.rows.next_groups(0), objective).minibatches
        if objective.needs:
            minibatch = with_old_policy(policy, minibatch)
        import_hf(policy.gpt_models(), new, plan.hf)
        bitwise = exports_what_it_imported(policy, new)
        report = update(policy, objective, optimizer, minibatch, lr=0.0)
        assert report.skipped is None, report.skipped
        results[name] = {"metrics": report.metrics, "gradient": whole_gradient(policy, rules), "bitwise": bitwise}
    shutdown()
    return results


def exports_what_it_imported(policy: Policy, source: Path) -> bool:
    """Whether the export of all ranks equals the safetensors of `source` to the last bit; true on ranks but the first."""
    exported = whole(policy, policy.family.parameters(policy.hf))
    if dist.get_rank() != 0:
        return True
    stored = load_file(source / "model.safetensors")
    return exported.keys() == stored.keys() and all(torch.equal(exported[name], stored[name]) for name in stored)


@torch.no_grad()
def whole_gradient(policy: Policy, rules: Sequence[Rule] | None = None) -> dict[str, torch.Tensor]:
    """The gradient in `main_grad` of all ranks, by the path on which weights are exported; empty but on rank 0.

    Args:
        rules: of what is trained; None: all that the family has.
    """
    for chunk in policy.chunks:
        if chunk.ddp_config.use_distributed_optimizer:
            _gather_shards(chunk)
    weights = [(p, p.data) for chunk in policy.chunks for p in chunk.parameters() if p.requires_grad]
    for p, _ in weights:
        p.data = p.main_grad.clone()
    gradient = whole(policy, rules or policy.family.parameters(policy.hf))
    for p, data in weights:
        p.data = data
    return gradient


def whole(policy: Policy, rules: Sequence[Rule]) -> dict[str, torch.Tensor]:
    """The tensors of the rules, on the CPU of rank 0; others get nothing. Collective."""
    weights = LiveWeights(policy.gpt_models(), policy.hf, rules)
    found = {name: rows_of(weights, name) for name in weights.tensors}
    return found if dist.get_rank() == 0 else {}


def random(name: str, shape: Sequence[int]) -> torch.Tensor:
    """The same for a name each time, and large enough to matter."""
    return 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def _gather_shards(chunk: torch.nn.Module) -> None:
    """With ZeRO-1 a rank holds the reduced gradient of its shard of each bucket only."""
    for buffer in chunk.buffers + chunk.expert_parallel_buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            shard = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)
