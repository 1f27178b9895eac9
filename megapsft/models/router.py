"""The router of experts: Megatron's, with a balance loss that no split changes, and with choices that can be made again.

Megatron's own auxiliary loss counts padding, is not linear over microbatches, and with `calculate_per_token_loss` is scaled by
1 / (tp cp): its gradient depends on the split. Its own RouterReplay keeps one choice a router, which the next microbatch of a
pipeline overwrites, and must be told between forward and backward what comes next, which no schedule does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megapsft.types import Microbatch


class BalanceLoss:
    """Sequence-wise balance loss of one update, over all MoE layers:

        L = coeff / S * sum over layers, samples s and experts i of f_si P_si
        f_si = E / (K n_s) * number of tokens of s that go to expert i         no gradient
        P_si = 1 / n_s * sum over tokens t of s of p_ti,  p_t = softmax over all E experts, fp32

    S samples of the update over all ranks, n_s real tokens of a sample, trained or not. A layer that routes evenly adds `coeff`.

    Gradients are of `scale * L`; `value`, a scalar fp64, is what this rank's tokens and layers add to L: its sum over all ranks
    of the world is L.

    Source: DeepSeek-V3 Technical Report (arXiv:2412.19437), Eq. 17-20, with the softmax as affinity; the product of f and P is
    that of Switch Transformers (Fedus et al., 2021), Eq. 4-6.

    Args:
        coeff: as above, more than 0.
        scale: what the training pass multiplies its losses with.
    """

    def __init__(self, coeff: float, scale: float, device: torch.device):
        self.coeff, self.scale = coeff, scale
        self.value = torch.zeros((), dtype=torch.float64, device=device)


@contextmanager
def routed(
    gpt: GPTModel, microbatch: Microbatch, *, balance: BalanceLoss | None = None, record: dict[int, Tensor] | None = None
) -> Iterator[None]:
    """Around one forward pass of `gpt` (a virtual stage) over `microbatch`: its backward pass needs nothing more.

    Where `microbatch.routing` is there, its experts are chosen again; their weights, and so gradients, are those of the present
    logits. Source: Group Sequence Policy Optimization (arXiv:2507.18071), section 5.3, "Routing Replay". Where instead
    `microbatch.rollout_routing` is there, so are those of the engine that sampled, and tokens that it did not route (of
    demonstrations, of padding, the last of a sample) choose for themselves. Source: Stabilizing MoE Reinforcement Learning by
    Aligning Training and Inference Routers (arXiv:2510.11370), "Rollout Routing Replay".

    Args:
        balance: the loss to add; collective over the tensor and context parallel ranks.
        record: filled with what the routers choose, MoE layer (from 1, over all stages) -> [tokens, K] uint8 (int16 above 256
            experts). Tokens are those of this rank's router: of its context-parallel slice, under sequence parallelism its part
            of that, flattened from [S, B].
    """
    routers = [layer.mlp.router for layer in gpt.decoder.layers if isinstance(getattr(layer.mlp, "router", None), Router)]
    sequences = _Sequences.of(microbatch, routers[0]) if routers and balance is not None else None
    for router in routers:
        experts = _chosen_before(microbatch, router)
        router.visit = _Visit(experts=experts, record=record, balance=balance, sequences=sequences)
    try:
        yield
    finally:
        for router in routers:
            router.visit = None


def _chosen_before(microbatch: Microbatch, router: Router) -> Tensor | None:
    """[tokens, K] of this rank's tokens at `router`, negative where a token chooses for itself; None where all do."""
    if microbatch.routing is not None:
        return microbatch.routing[router.layer_number]
    if microbatch.rollout_routing is None:
        return None
    experts = microbatch.rollout_routing[:, :, router.layer_number - 1].transpose(0, 1)  # [S, B, K]; every layer has experts
    return _own_positions(experts, router).flatten(0, 1)


def _own_positions(tokens: Tensor, router: Router) -> Tensor:
    """This rank's part of [S, B, ...]: experts under tensor parallelism always come with sequence parallelism."""
    return tokens.chunk(router.tp_group.size())[router.tp_group.rank()]


@dataclass(frozen=True, kw_only=True)
class _Sequences:
    """Whose token is whose, alike on all ranks that hold parts of the same samples."""

    index: Tensor  # [tokens] int64, of this rank's router: place of the token's sequence in the microbatch, `count` on padding
    count: int
    samples: int  # of the update, all ranks

    @staticmethod
    def of(microbatch: Microbatch, router: Router) -> _Sequences:
        ids = microbatch.sample_ids
        if microbatch.cu_seqlens is None:
            index, count = torch.arange(len(ids), device=ids.device)[:, None], len(ids)
        else:
            lengths = microbatch.cu_seqlens.to(ids.device).diff() // router.cp_group.size()
            places, count = torch.arange(len(lengths), device=ids.device), len(lengths)
            index = torch.repeat_interleave(places, lengths, output_size=ids.shape[1])[None]
        index = torch.where(ids >= 0, index, count).T  # [S, B], as hidden states are
        return _Sequences(index=_own_positions(index, router).flatten(), count=count, samples=microbatch.samples)


@dataclass(kw_only=True, eq=False)
class _Visit:
    """One microbatch at one router, from its forward pass to the recomputation in its backward pass."""

    experts: Tensor | None  # [tokens, K] of any integer type: to be chosen again, unless negative
    record: dict[int, Tensor] | None
    balance: BalanceLoss | None
    sequences: _Sequences | None
    trains: bool = field(default_factory=torch.is_grad_enabled)
    slopes: Tensor | None = None  # [sequences + 1, E] fp32: dL/dp of a token by its sequence; made once, recomputed never


class Router(TopKRouter):
    """Megatron's router, which `routed` tells whose tokens come next; outside of it, Megatron's behaviour."""

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None, **newer: Any):
        super().__init__(config, pg_collection, **newer)
        self.router_replay = self.choice = _Choice()
        self.visit: _Visit | None = None
        self.unfinished: deque[_Visit] = deque()  # backward passes come in the order of the forward passes, in every schedule

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights and choices, [tokens, E] each, of logits [S, B, E]."""
        visit = self.visit
        if visit is None and self.unfinished and torch.is_grad_enabled():
            visit = self.unfinished.popleft()  # a checkpoint runs again what it ran without gradient
        elif visit is not None and visit.trains and not torch.is_grad_enabled():
            self.unfinished.append(visit)
        self.choice.again = None if visit is None or visit.experts is None else visit.experts.to(logits.device, torch.int64)
        weights, chosen = super().routing(logits, padding_mask)
        if visit is None:
            return weights, chosen
        if visit.record is not None and self.visit is not None:
            visit.record[self.layer_number] = self.choice.made.to(torch.uint8 if self.num_experts <= 256 else torch.int16)
        if visit.balance is not None:
            weights = self._balance(weights, chosen, logits.view(-1, self.num_experts), visit)
        return weights, chosen

    def _balance(self, weights: Tensor, chosen: Tensor, logits: Tensor, visit: _Visit) -> Tensor:
        """`weights`, whose backward pass adds the gradient of the balance loss to that of `logits`; its value is added once."""
        index, loss = visit.sequences.index, visit.balance
        with torch.no_grad():
            p = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
            p = torch.where((index < visit.sequences.count)[:, None], p, 0)
            if visit.slopes is None:
                visit.slopes = self._slopes(chosen, visit)
                loss.value += (p * visit.slopes[index]).sum(dtype=torch.float64)
        return _AddGradient.apply(weights, logits, p, visit.slopes, index, loss.scale)

    def _slopes(self, chosen: Tensor, visit: _Visit) -> Tensor:
        """dL/dp_ti = coeff f_si / (S n_s), [sequences + 1, E] fp32; the last row is of padding, where p is 0. Collective."""
        sequences = visit.sequences
        counts = torch.zeros(sequences.count + 1, self.num_experts, device=chosen.device)
        counts.index_add_(0, sequences.index, chosen.float())
        if self.tp_cp_group.size() > 1:  # these ranks hold the other parts of the same samples
            dist.all_reduce(counts, group=self.tp_cp_group)
        choices = counts.sum(1, keepdim=True).clamp(min=1)  # K n_s
        return visit.balance.coeff / sequences.samples * self.num_experts * self.topk * counts / choices**2


class _Choice:
    """What Megatron's RouterReplay is to a router: asked for the top experts of each token."""

    def __init__(self) -> None:
        self.again: Tensor | None = None  # [tokens, K] int64, negative where a token chooses for itself
        self.made: Tensor | None = None  # [tokens, K] int64

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, default_compute_topk: Callable
    ) -> tuple[Tensor, Tensor]:
        """(scores, experts), [tokens, K] each, by falling score or in the order of the first time."""
        if group_topk:
            values, self.made = default_compute_topk(scores, topk, num_groups, group_topk)
        else:  # newer Megatron leaves them unsorted without gradient, and then a pass has other bits than the training pass
            values, self.made = torch.topk(scores, k=topk, dim=1)
        if self.again is not None:
            self.made = torch.where(self.again < 0, self.made, self.again)
            values = scores.gather(1, self.made)
        return values, self.made


class _AddGradient(torch.autograd.Function):
    """The identity on the router's weights; adds scale * p (g - sum_i p_i g_i), with g = slopes[index], to d logits."""

    @staticmethod
    def forward(ctx, weights: Tensor, logits: Tensor, p: Tensor, slopes: Tensor, index: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(p, slopes, index)
        ctx.scale, ctx.dtype = scale, logits.dtype
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        p, slopes, index = ctx.saved_tensors
        slope = slopes[index]
        added = ctx.scale * p * (slope - (p * slope).sum(-1, keepdim=True))
        return gradient, added.to(ctx.dtype), None, None, None, None


__all__ = ["BalanceLoss", "Router", "routed"]
