"""PPO's value function in training: values before the step, advantages and returns from them, and its own updates."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from megapsft.advantages.gae import gae, whiten
from megapsft.metrics.reduce import Reduction
from megapsft.platform.clock import part
from megapsft.policy.build import Policy
from megapsft.policy.constants import without_routing
from megapsft.policy.forward import evaluate
from megapsft.policy.per_sample import at_positions, gather_samples
from megapsft.train.update import Report, descend, flops_of
from megapsft.types import AdvantageOptions, Microbatch, Minibatch, Objective, TrainBatch


@dataclass(frozen=True)
class Critic:
    """A value function with its optimizer."""

    policy: Policy
    optimizer: ChainedOptimizer
    lr: float

    def with_values(self, batch: TrainBatch, objective: Objective) -> TrainBatch:
        """Collective. The batch with `values`, and what generalised advantage estimation makes of them and of the rewards.

        The reward of a sample falls on its last trained token; advantages are whitened over the whole step.
        """
        if not batch.minibatches:
            return batch
        with part("critic"):
            return self._with_values(batch, objective)

    def _with_values(self, batch: TrainBatch, objective: Objective) -> TrainBatch:
        values = [[o[..., 0] for o in evaluate(self.policy, without_routing(m), None)] for m in batch.minibatches]
        has_head = self.policy.head() is not None
        device = self.policy.device

        def gather(name: str | None) -> list[np.ndarray]:
            tokens = [[_field(m, name) for m in minibatch.microbatches] for minibatch in batch.minibatches]
            return [table.cpu().numpy() for table in gather_samples(batch, tokens, has_head, device)]

        trained = [table > 0 for table in gather(None)]
        rewards = [_at_last(table, mask) for table, mask in zip(gather("rewards"), trained, strict=True)]
        options = objective.advantages
        if options.kl_coef:
            pairs = zip(rewards, gather("old_logprobs"), gather("ref_logprobs"), strict=True)
            rewards = [reward - options.kl_coef * (old - ref) for reward, old, ref in pairs]
        tables = [table.cpu().numpy() for table in gather_samples(batch, values, has_head, device)]
        advantages, returns = estimate(rewards, tables, trained, options)

        def fill(number: int, minibatch: Minibatch) -> Minibatch:
            a, r = (torch.from_numpy(of_step[number]).to(device) for of_step in (advantages, returns))
            found = values[number] or [None] * len(minibatch.microbatches)
            microbatches = tuple(
                dataclasses.replace(m, values=v, advantages=at_positions(a, m), returns=at_positions(r, m))
                for m, v in zip(minibatch.microbatches, found, strict=True)
            )
            return dataclasses.replace(minibatch, microbatches=microbatches)

        return TrainBatch(minibatches=tuple(fill(*one) for one in enumerate(batch.minibatches)))

    def update(self, objective: Objective, minibatch: Minibatch, report: Report) -> Report:
        """Collective. One update of the value function; the report of the policy's update with that of its own."""
        with part("critic"):
            return self._update(objective, minibatch, report)

    def _update(self, objective: Objective, minibatch: Minibatch, report: Report) -> Report:
        reduction = Reduction(objective.value_metrics, self.policy.device)

        def consume(output: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor]:
            losses, metrics = objective.value_loss(output[..., 0], microbatch)
            loss = torch.where(microbatch.loss_mask, microbatch.loss_weights * losses, 0.0).sum()
            if parallel_state.get_tensor_model_parallel_rank() == 0:
                reduction.add(metrics, microbatch.loss_mask)
            return loss, loss.detach().double()

        done = descend(self.policy, self.optimizer, without_routing(minibatch), consume, None, self.lr)
        metrics = reduction.finish(dist.group.WORLD)
        metrics |= {
            "critic/loss": done.loss,
            "critic/grad_norm": done.grad_norm,
            "critic/explained_variance": objective.explained_variance(metrics),
            "perf/model_flops": report.metrics["perf/model_flops"] + flops_of(self.policy, minibatch, head=False),
        }
        return Report(report.metrics | metrics, report.skipped or (f"critic: {done.skipped}" if done.skipped else None))


def estimate(
    rewards: list[np.ndarray], values: list[np.ndarray], trained: list[np.ndarray], options: AdvantageOptions
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Advantages and returns of a step, of the shapes of its tables: [samples, longest] for each minibatch."""
    rows = [(table, i) for table in range(len(values)) for i in range(len(values[table]))]
    pairs = [gae(rewards[t][i], values[t][i], trained[t][i], options.gamma, options.lam) for t, i in rows]
    masks = [trained[t][i] for t, i in rows]
    advantages = [advantage for advantage, _ in pairs]
    if options.whiten:
        advantages = whiten(advantages, masks)
    found = [np.zeros_like(table) for table in values], [np.zeros_like(table) for table in values]
    for (t, i), advantage, (_, ret) in zip(rows, advantages, pairs, strict=True):
        found[0][t][i], found[1][t][i] = advantage, ret
    return found


def _field(microbatch: Microbatch, name: str | None) -> Tensor:
    return torch.ones(microbatch.loss_mask.shape) if name is None else getattr(microbatch, name)


def _at_last(rewards: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """[samples, longest] the reward of each sample at its last trained token, 0 elsewhere."""
    found = np.zeros_like(rewards)
    rows = np.flatnonzero(trained.any(axis=1))
    last = trained.shape[1] - 1 - trained[rows, ::-1].argmax(axis=1)
    found[rows, last] = rewards[rows, last]
    return found
