"""Hidden states to per-token log-probability and entropy over tensor-parallel vocabulary shards, never holding all logits.

With logits z = h W^T, lse = logsumexp(z), p = exp(z - lse), label y:

    log-probability  l = z_y - lse             dl/dz = 1[y] - p
    entropy          H = lse - sum_v p_v z_v   dH/dz = -p (z - sum_v p_v z_v)

Tokens go in chunks of a byte budget; the backward recomputes the logits of a chunk, unless one chunk holds all tokens.
Operands of the matrix products are in the model's dtype, everything else is fp32 (fp64 for fp64 models). One collective: each
rank's (max, sum of exp, sum of z exp, z_y) of every token is all-gathered and merged alike on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megapsft.errors import Refused
from megapsft.types import VocabularyTerm


@dataclass(frozen=True, kw_only=True)
class HeadRequest:
    labels: Tensor
    temperature: float = 1.0
    entropy_gradient: bool = False
    term: VocabularyTerm | None = None
    ref_hidden: Tensor | None = None
    ref_weight: Tensor | None = None


def resolve_backend(name: str) -> str:
    return "torch"


class LogprobHead(ColumnParallelLinear):
    """Megatron's output layer, giving (log-probability, entropy) of `labels` instead of logits.

    It stays the module that Megatron built (same parameter, same hooks of DistributedDataParallel, same checkpoint key, tied or
    not), so `adopt` changes its class in place. With `labels` None it gives logits, as before.
    """

    request: HeadRequest | Literal["hidden"] | None
    valid_vocab: int
    chunk_bytes: int

    @classmethod
    def adopt(cls, layer: ColumnParallelLinear, valid_vocab: int, chunk_bytes: int, backend: str = "torch") -> LogprobHead:
        layer.__class__ = cls
        layer.request, layer.valid_vocab, layer.chunk_bytes = None, valid_vocab, chunk_bytes
        return layer

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """[S, B, D] (or its sequence-parallel shard) -> [S, B, 2] fp32: log-probability and entropy of `labels` [B, S]."""
        if self.request == "hidden":
            return input_, None
        if self.request is None:
            return super().forward(input_, weight, runtime_gather_output)
        weight = self.weight if weight is None else weight
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        labels = self.request.labels.transpose(0, 1).reshape(-1)
        logprobs, entropy = vocab_parallel_logprobs(
            hidden.flatten(0, 1), weight, labels, self.tp_group, self.valid_vocab, self.chunk_bytes, self.request.entropy_gradient
        )
        return torch.stack((logprobs, entropy), dim=-1).view(*hidden.shape[:2], 2), None


def vocab_parallel_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup | None,
    valid_vocab: int,
    chunk_bytes: int,
    entropy_gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy of each position.

    Args:
        hidden: [T, D], the same on every rank of `group`; its gradient comes back as this rank's part, to be summed.
        weight: [V / p, D], this rank's rows of the padded vocabulary.
        labels: [T] int64, in [0, valid_vocab).
        valid_vocab: rows of the true vocabulary; the padded rows beyond have probability 0 and no gradient.
        chunk_bytes: of one chunk of fp32 logits; about two are held at once, and one until the backward where it has all tokens.
        entropy_gradient: whether the returned entropy carries a gradient.

    Returns:
        logprobs [T], entropy [T] in fp32 (fp64 for fp64 inputs), nats, the same on every rank of `group`.
    """
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    if valid_vocab > weight.shape[0] * size:
        rows = weight.shape[0] * size
        raise Refused(f"vocabulary of {valid_vocab}", f"exceeds the {rows} rows of the output layer", "check config.json")
    first = rank * weight.shape[0]
    rows = max(0, min(valid_vocab - first, weight.shape[0]))
    chunk = max(1, chunk_bytes // (4 * max(rows, 1)))
    group = group if size > 1 else None
    return _LogprobsAndEntropy.apply(hidden, weight, labels, group, first, rows, chunk, entropy_gradient)


class _LogprobsAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, group, first, rows, chunk, entropy_gradient):
        exact = torch.promote_types(hidden.dtype, torch.float32)
        stats = hidden.new_empty(4, hidden.shape[0], dtype=exact)
        shard, exp = weight[:rows], None
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            stats[:, part], exp = _shard_stats(hidden[part], shard, labels[part], first, exact)
        # all tokens in one chunk: within the budget they can stay, and the backward need not recompute them
        keep = hidden.shape[0] <= chunk and rows > 0 and not entropy_gradient and any(ctx.needs_input_grad)
        local_top = stats[0] if keep else None
        top, total, weighted, target = stats if group is None else _merge(stats, group)
        lse = top + total.log()
        mean = weighted / total  # sum_v p_v z_v
        ctx.save_for_backward(hidden, weight, labels, lse, mean, *((exp, local_top) if keep else ()))
        ctx.first, ctx.rows, ctx.chunk = first, rows, chunk
        ctx.set_materialize_grads(False)
        logprobs, entropy = target - lse, lse - mean
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, labels, lse, mean, *kept = ctx.saved_tensors
        shard = weight[: ctx.rows]
        grad_hidden = torch.zeros_like(hidden, dtype=lse.dtype)
        grad_weight = torch.zeros_like(weight, dtype=lse.dtype)
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(lse)
        for start in range(0, hidden.shape[0] if ctx.rows else 0, ctx.chunk):
            part = slice(start, start + ctx.chunk)
            if kept:
                exp, local_top = kept
                grad = exp * ((local_top - lse).exp_() * -grad_logprobs)[:, None]
            elif grad_entropy is None:
                grad = (hidden[part] @ shard.T).to(lse.dtype).sub_(lse[part, None]).exp_()  # p
                grad.mul_(-grad_logprobs[part, None])
            else:
                logits = (hidden[part] @ shard.T).to(lse.dtype)
                grad = (logits - lse[part, None]).exp_()
                centred = logits.sub_(mean[part, None]).mul_(grad_entropy[part, None])
                grad.mul_(centred.add_(grad_logprobs[part, None]).neg_())
            local = labels[part] - ctx.first
            mine = (local >= 0) & (local < ctx.rows)
            picked = torch.where(mine, grad_logprobs[part], 0.0)
            grad.scatter_add_(1, local.clamp(0, ctx.rows - 1)[:, None], picked[:, None])
            grad = grad.to(hidden.dtype)
            grad_hidden[part] = grad @ shard
            grad_weight[: ctx.rows] += grad.T @ hidden[part]
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), None, None, None, None, None, None


def _shard_stats(
    hidden: Tensor, shard: Tensor, labels: Tensor, first: int, exact: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """[4, T]: max, sum of exp(z - max), sum of z exp(z - max), z of the label (0 where another shard has it).

    And exp(z - max) itself, [T, rows of the shard].
    """
    if shard.shape[0] == 0:  # a shard of nothing but padding
        stats = hidden.new_zeros(4, hidden.shape[0], dtype=exact)
        stats[0] = torch.finfo(exact).min
        return stats, None
    logits = (hidden @ shard.T).to(exact)
    top = logits.amax(dim=1)
    local = labels - first
    mine = (local >= 0) & (local < shard.shape[0])
    target = logits.gather(1, local.clamp(0, shard.shape[0] - 1)[:, None]).squeeze(1)
    exp = (logits - top[:, None]).exp_()
    weighted = logits.mul_(exp).sum(dim=1)
    return torch.stack((top, exp.sum(dim=1), weighted, torch.where(mine, target, 0.0))), exp


def _merge(stats: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The statistics of the whole vocabulary from those of the shards, in the same order on every rank."""
    shards = stats.new_empty(group.size() * stats.shape[0], stats.shape[1])
    dist.all_gather_into_tensor(shards, stats, group=group)
    tops, totals, weighteds, targets = shards.view(group.size(), *stats.shape).unbind(1)
    top = tops.amax(dim=0)
    scale = (tops - top).exp_()
    return top, (totals * scale).sum(dim=0), (weighteds * scale).sum(dim=0), targets.sum(dim=0)
