"""One optimizer update: losses and gradients of a minibatch, then a step, or a reason why there was none."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from megapsft.metrics.reduce import Reduction
from megapsft.models.names import canonical_name
from megapsft.policy.build import Policy
from megapsft.policy.forward import forward_backward, with_old_policy
from megapsft.train.optimizer import step_if_finite
from megapsft.types import Metric, Microbatch, Minibatch, Objective, PolicyOutput, TrainBatch


@dataclass(frozen=True)
class Report:
    """What an update did, the same on every rank."""

    metrics: dict[str, float]
    skipped: str | None  # why there was no optimizer step


def add_old_policy(policy: Policy, batch: TrainBatch, objective: Objective) -> TrainBatch:
    """Log-probabilities and entropies of the policy at the start of the step, for those minibatches that need a pass.

    The first minibatch needs none: its training pass *is* the old policy, bit for bit, so the update takes its own values
    (`at_old_policy`). Only where weights depend on them (`select`) must they be known beforehand.
    """
    if not objective.needs:
        return batch
    first = () if _selects(objective) else batch.minibatches[:1]
    rest = tuple(with_old_policy(policy, minibatch) for minibatch in batch.minibatches[len(first) :])
    return TrainBatch(minibatches=first + rest)


def update(policy: Policy, objective: Objective, optimizer: ChainedOptimizer, minibatch: Minibatch, lr: float) -> Report:
    """Collective. Gradient of sum(loss_weights * loss) over all microbatches and ranks, clipped, and one AdamW step.

    No step is taken, and parameters stay as they are, where no token is trained or a gradient is not finite.
    """
    if _selects(objective):
        minibatch = _renormalise(minibatch, objective, policy)
    counts = parallel_state.get_tensor_model_parallel_rank() == 0  # ranks of a tensor group hold the same outputs
    reduction = Reduction({**objective.metrics, **dict.fromkeys(_entropies(objective), "mean")}, policy.device)

    def consume(output: PolicyOutput, microbatch: Microbatch) -> tuple[Tensor, Tensor]:
        microbatch = at_old_policy(microbatch, output)
        losses, metrics = objective(output, microbatch)
        loss = torch.where(microbatch.loss_mask, microbatch.loss_weights * losses, 0.0).sum()
        if counts:
            entropies = zip(_entropies(objective), (output.entropy, microbatch.old_entropy), strict=False)
            reduction.add({**metrics, **{key: Metric(values) for key, values in entropies}}, microbatch.loss_mask)
        return loss, loss.detach().double()

    optimizer.zero_grad()  # or the first microbatch would be added to what the last step left in param.grad
    losses = forward_backward(policy, minibatch, consume)
    loss = sum(losses if counts else (), torch.zeros((), dtype=torch.float64, device=policy.device))
    dist.all_reduce(loss)
    metrics = reduction.finish(dist.group.WORLD)
    metrics |= {
        "train/loss": loss.item(),
        "train/grad_norm": 0.0,
        "train/lr": lr,
        "data/trained_tokens": minibatch.trained_tokens,
        "data/real_tokens": minibatch.real_tokens,
        "data/samples": minibatch.samples,
    }
    if minibatch.trained_tokens == 0:
        return Report(metrics, "no token is trained")
    norm = step_if_finite(optimizer, lr)
    metrics["train/grad_norm"] = norm
    if math.isfinite(norm):
        return Report(metrics, None)
    return Report(metrics, f"the gradient is not finite: {_culprits(policy, losses)}")


def at_old_policy(microbatch: Microbatch, output: PolicyOutput) -> Microbatch:
    """The microbatch with its old policy; on the first update of a step that is the policy itself."""
    if microbatch.old_logprobs is not None:
        return microbatch
    return dataclasses.replace(microbatch, old_logprobs=output.logprobs.detach(), old_entropy=output.entropy.detach())


def _entropies(objective: Objective) -> tuple[str, ...]:
    """Metrics of entropies: of the policy, and where there is one of the old policy."""
    return ("policy/entropy", "policy/old_entropy") if objective.needs else ("policy/entropy",)


def _selects(objective: Objective) -> bool:
    """Whether the objective's weights depend on the old policy, so that denominators must be counted before the update."""
    return objective.selects


def _renormalise(minibatch: Minibatch, objective: Objective, policy: Policy) -> Minibatch:
    """Loss weights over the tokens that the objective selects: N trained tokens become n, over all ranks."""
    selected = torch.zeros((), dtype=torch.int64, device=policy.device)
    has_head = policy.head() is not None
    if has_head and parallel_state.get_tensor_model_parallel_rank() == 0:
        selected = sum((objective.select(m).sum() for m in minibatch.microbatches), selected)
    dist.all_reduce(selected)
    if not has_head:
        return minibatch
    scale = minibatch.trained_tokens / max(1, int(selected))
    microbatches = tuple(dataclasses.replace(m, loss_weights=m.loss_weights * scale) for m in minibatch.microbatches)
    return dataclasses.replace(minibatch, microbatches=microbatches)


def _culprits(policy: Policy, losses: list[Tensor]) -> str:
    """Which ranks saw a loss that is not finite, and the first parameter of each rank whose gradient is not."""
    bad_losses = sum(not torch.isfinite(loss).item() for loss in losses)
    found = [f"{bad_losses} of {len(losses)} microbatch losses"] if bad_losses else []
    for gpt, chunk in zip(policy.gpt_models(), policy.chunks, strict=True):
        offset = gpt.decoder.layers[0].layer_number - 1 if len(gpt.decoder.layers) else 0
        bad = [n for n, p in chunk.named_parameters() if p.requires_grad and not torch.isfinite(p.main_grad).all()]
        if bad:
            found.append(f"{canonical_name(bad[0], offset, 0)} and {len(bad) - 1} more parameters")
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, found)
    return "; ".join(f"rank {rank}: {', '.join(bad)}" for rank, bad in enumerate(everyone) if bad)
