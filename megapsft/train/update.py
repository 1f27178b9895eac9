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
from megapsft.models.flops import model_flops
from megapsft.models.names import canonical_name
from megapsft.models.router import BalanceLoss
from megapsft.platform.clock import part
from megapsft.policy.build import Policy
from megapsft.policy.constants import with_entropy
from megapsft.policy.forward import Consume, Head, evaluate, forward_backward, read, to_device
from megapsft.policy.reference import Reference
from megapsft.train.optimizer import step_if_finite
from megapsft.train.phases import has_old_policy
from megapsft.train.tokens import Tokens
from megapsft.types import Metric, Microbatch, Minibatch, Objective, Over, PolicyOutput

MOST_TOTALS = 16  # of an objective
MISMATCH_METRICS: dict[str, Over] = {
    "rollout/mismatch_kl": "mean",
    "rollout/mismatch_k3": "mean",
    "rollout/mismatch_max": "max",
}


@dataclass(frozen=True)
class Report:
    """What an update did, the same on every rank."""

    metrics: dict[str, float]
    skipped: str | None  # why there was no optimizer step


def update(
    policy: Policy,
    objective: Objective,
    optimizer: ChainedOptimizer,
    minibatch: Minibatch,
    lr: float | None,
    reference: Reference | None = None,
    tokens: Tokens | None = None,
) -> Report:
    """Collective. Gradient of sum(loss_weights * loss) over all microbatches and ranks, clipped, and one AdamW step.

    No step is taken, and parameters stay as they are, where no token is trained or a gradient is not finite.

    Args:
        lr: learning rate of the step; None for neither gradient nor step: a report on the policy as it is.
        tokens: keeps what is known of each token that is trained.
    """
    if objective.totals_need is not None:
        with part("totals"):
            minibatch = with_totals(policy, objective, minibatch)
    entropies = ("policy/entropy", "policy/old_entropy") if has_old_policy(objective) else ("policy/entropy",)
    compares = has_old_policy(objective) and _sampled_elsewhere(minibatch)
    measured = {**objective.metrics, **dict.fromkeys(entropies, "mean"), **(MISMATCH_METRICS if compares else {})}
    reduction = Reduction(measured, policy.device)

    def consume(output: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor]:
        output = read(output)
        microbatch = at_old_policy(microbatch, output)
        losses, metrics = objective(output, microbatch)
        loss = torch.where(microbatch.loss_mask, microbatch.loss_weights * losses, 0.0).sum()
        if _counts():
            if compares:
                metrics = metrics | mismatch_metrics(microbatch)
            if tokens is not None and lr is not None:
                tokens.add(output, microbatch, metrics)
            values = zip(entropies, (output.entropy, microbatch.old_entropy), strict=False)
            reduction.add({**metrics, **{key: Metric(value) for key, value in values}}, microbatch.loss_mask)
        return loss, loss.detach().double()

    weight = reference.output_weight(policy) if "ref_hidden" in objective.needs else None
    head = Head(entropy_gradient=objective.entropy_gradient, term=objective.term, ref_weight=weight)
    found, skipped = {"train/lr": lr or 0.0}, None
    if lr is None:
        with part("forward_backward"):
            found["train/loss"] = loss_of(policy, minibatch, consume, head)
    else:
        done = descend(policy, optimizer, minibatch, consume, head, lr)
        found |= {"train/loss": done.loss, "train/grad_norm": done.grad_norm}
        if policy.config.moe_aux_loss_coeff:
            found["moe/aux_loss"] = done.aux_loss
        skipped = done.skipped
    with part("optimizer"):  # whose end the read of the metrics waits for
        metrics = reduction.finish(dist.group.WORLD) | found
    metrics |= {
        "perf/model_flops": flops_of(policy, minibatch) if lr is not None else 0.0,
        "data/trained_tokens": minibatch.trained_tokens,
        "data/real_tokens": minibatch.real_tokens,
        "data/samples": minibatch.samples,
    }
    return Report(metrics, skipped)


def loss_of(policy: Policy, minibatch: Minibatch, consume: Consume, head: Head | None) -> float:
    """Collective. The loss of `descend`, of a pass without gradient."""
    outputs = evaluate(policy, minibatch, head)
    microbatches = (to_device(microbatch, policy.device) for microbatch in minibatch.microbatches)
    losses = [consume(output, microbatch)[1] for output, microbatch in zip(outputs, microbatches, strict=False)]
    total = torch.zeros((), dtype=torch.float64, device=policy.device)
    if _counts():
        total = sum(losses, total)
    dist.all_reduce(total)
    return total.item()


@dataclass(frozen=True)
class Descent:
    """A gradient, and whether a step followed it."""

    loss: float
    aux_loss: float  # of the balance of experts
    grad_norm: float  # before clipping
    skipped: str | None


def descend(
    policy: Policy, optimizer: ChainedOptimizer, minibatch: Minibatch, consume: Consume, head: Head | None, lr: float
) -> Descent:
    """Collective. Forward, backward and, where the gradient is there and finite, the step."""
    optimizer.zero_grad()  # or the first microbatch would be added to what the last step left in param.grad
    coeff = policy.config.moe_aux_loss_coeff
    balance = BalanceLoss(coeff, minibatch.forward_tokens, policy.device) if coeff else None
    with part("forward_backward"):
        losses = forward_backward(policy, minibatch, consume, head, balance)
        sums = torch.zeros(2, dtype=torch.float64, device=policy.device)
        if _counts():
            sums[0] = sum(losses, sums[0])
        if balance is not None:
            sums[1] = balance.value
        dist.all_reduce(sums)
        loss, aux_loss = sums.tolist()
    if minibatch.trained_tokens == 0:
        return Descent(loss, aux_loss, 0.0, "no token is trained")
    with part("optimizer"):
        norm = step_if_finite(optimizer, lr)
    if math.isfinite(norm):
        return Descent(loss, aux_loss, norm, None)
    return Descent(loss, aux_loss, norm, f"the gradient is not finite: {_culprits(policy, losses)}")


def flops_of(model: Policy, minibatch: Minibatch, *, head: bool = True) -> float:
    """Of `model_flops`: what training the model on the minibatch takes, over all ranks."""
    return model_flops(model.hf, minibatch.real_tokens, minibatch.squared_lengths, head=head, frozen=model.frozen)


def at_old_policy(microbatch: Microbatch, output: PolicyOutput) -> Microbatch:
    """The microbatch with its old policy; on the first update of a step that is the policy itself."""
    if microbatch.old_logprobs is not None:
        return microbatch
    return dataclasses.replace(microbatch, old_logprobs=output.logprobs.detach(), old_entropy=output.entropy.detach())


def with_totals(policy: Policy, objective: Objective, minibatch: Minibatch) -> Minibatch:
    """Collective. The minibatch with `Objective.totals`, summed over all its microbatches and ranks."""
    if "entropy" in objective.totals_need:
        minibatch = with_entropy(policy, minibatch)
    sums = torch.zeros(MOST_TOTALS, dtype=torch.float64, device=policy.device)
    names: list[str] = []  # stages without a head add nothing, and need nothing
    for microbatch in minibatch.microbatches if policy.head() is not None else ():
        totals = objective.totals(to_device(microbatch, policy.device))
        names = sorted(totals)
        if _counts():
            sums[: len(names)] += torch.stack([totals[name].double() for name in names])
    dist.all_reduce(sums)
    totals = dict(zip(names, sums.tolist(), strict=False))
    microbatches = tuple(dataclasses.replace(m, totals=totals) for m in minibatch.microbatches)
    return dataclasses.replace(minibatch, microbatches=microbatches)


def mismatch_metrics(microbatch: Microbatch) -> dict[str, Metric]:
    """How far the engine that sampled is from the policy before the step, on the tokens of rollouts."""
    where = microbatch.loss_mask & ~microbatch.demonstration
    both = (microbatch.old_logprobs, microbatch.rollout_logprobs)
    old, rollout = (torch.where(where, logprobs.detach(), 0) for logprobs in both)
    d, weights = old - rollout, where.to(old.dtype)
    return {
        "rollout/mismatch_kl": Metric(-d, "mean", weights),
        "rollout/mismatch_k3": Metric((torch.expm1(d) - d).clamp(max=torch.finfo(d.dtype).max), "mean", weights),
        "rollout/mismatch_max": Metric(d.abs(), "max", weights),
    }


def _sampled_elsewhere(minibatch: Minibatch) -> bool:
    """Whether the rows say what an engine thought of them; on all ranks the same, as all rows do or none."""
    return any(microbatch.rollout_logprobs is not None for microbatch in minibatch.microbatches)


def _counts() -> bool:
    """Ranks of a tensor group hold the same outputs: one of them counts."""
    return parallel_state.get_tensor_model_parallel_rank() == 0


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
