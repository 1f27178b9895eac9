"""Drawing tokens from tensor-parallel shards of logits: exact, and the same whatever the split and the batch.

Gumbel-max: the token with the largest z_v + g_v, where all g_v = -log(-log u_v) are independent, is a draw from softmax(z). A
rank needs the noise of its own columns only, and hashing gives it: u_v is number v of the stream of (key, position).

Source: A* Sampling (Maddison, Tarlow and Minka, NeurIPS 2014), section 2; Fast Splittable Pseudorandom Number Generators (Steele,
Lea and Flood, OOPSLA 2014), Figure 16, for the generator, SplitMix64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megapsft.rollout.base import Sampling

# of SplitMix64, as the signed integers that torch has
GAMMA = 0x9E3779B97F4A7C15 - 2**64
MIX = (30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)
BITS = 52  # of a uniform number: with the half that keeps it off 0 and 1, as many as fp64 holds
BLOCK = 2**15  # numbers at once on a CPU, which has them in its cache then


def sample_key(seed: int, prompt_ids: Sequence[int], number: int) -> int:
    """64 bits, signed: the key of the `number`-th response to a prompt, the same wherever the prompt stands."""
    content = np.array([seed, number, *prompt_ids], dtype="<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def gumbel(keys: Tensor, positions: Tensor, first: int, count: int) -> Tensor:
    """[B, count] fp64: the noise of columns first, ..., first + count - 1 of the vocabulary.

    Args:
        keys: [B] int64, of the samples, and `positions` [B] int64, of the token to draw.
    """
    columns = torch.arange(first + 1, first + count + 1, device=keys.device) * GAMMA
    streams = _mixed(keys + (positions + 1) * GAMMA)
    rows = max(1, BLOCK // count) if keys.device.type == "cpu" else max(1, len(keys))
    noise = torch.empty((len(keys), count), dtype=torch.float64, device=keys.device)
    for start in range(0, len(keys), rows):
        bits = _mixed(streams[start : start + rows, None] + columns)
        uniform = (_shifted(bits, 64 - BITS).double() + 0.5) * 2.0**-BITS
        noise[start : start + rows] = uniform.log_().neg_().log_().neg_()
    return noise


def draw(
    logits: Tensor, first: int, group: dist.ProcessGroup | None, sampling: Sampling, keys: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """One token for each row, and its log-probability under the temperature, before top_k and top_p. Collective over `group`.

    Args:
        logits: [B, V / p] fp32 or fp64, this rank's columns; -inf where there is no token.
        first: column of the whole vocabulary that is this rank's first.
        keys: [B] int64, of the samples, and `positions` [B] int64, of the token to draw.

    Returns:
        [B] int64 and [B] of the dtype of `logits`, nats: the same on every rank of `group`.
    """
    group = None if group is None or group.size() == 1 else group
    z = logits / sampling.temperature if sampling.temperature else logits
    scores = z if sampling.top_k == -1 and sampling.top_p == 1 else torch.where(_kept(z, group, sampling), z, -torch.inf)
    if sampling.temperature:
        scores = gumbel(keys, positions, first, z.shape[1]).add_(scores)
    best, column = scores.max(dim=1)
    chosen = z.gather(1, column[:, None])[:, 0]
    if group is None:
        return column + first, chosen - z.logsumexp(dim=1)
    top = z.amax(dim=1).clamp(min=torch.finfo(z.dtype).min)  # a shard of padding alone has -inf
    mass = (z - top[:, None]).exp().sum(dim=1)
    parts = torch.stack([x.double() for x in (best, column + first, chosen, top, mass)])
    best, token, chosen, top, mass = _gather(parts, group).unbind(1)  # [p, B] each
    winner = best.argmax(dim=0, keepdim=True)  # the first of equal ones, as in each shard
    normaliser = (top + mass.log()).logsumexp(dim=0)
    return token.gather(0, winner)[0].long(), (chosen.gather(0, winner)[0] - normaliser).to(z.dtype)


def _mixed(x: Tensor) -> Tensor:
    for shift, factor in MIX:
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """x of 64 bits without a sign, shifted right."""
    return (x >> by) & ((1 << 64 - by) - 1)


def _kept(z: Tensor, group: dist.ProcessGroup | None, sampling: Sampling) -> Tensor:
    """[B, V / p] bool: which of this rank's tokens top_k and top_p leave."""
    shards = _gather(z, group)
    whole = shards.transpose(0, 1).flatten(1)  # [B, V]
    ordered = _largest(whole, whole.shape[1] if sampling.top_k == -1 else min(sampling.top_k, whole.shape[1]))
    count = torch.full((len(whole), 1), ordered.shape[1], device=z.device)
    if sampling.top_p < 1:
        probabilities = (ordered - whole.logsumexp(dim=1, keepdim=True)).double().exp()
        count = (probabilities.cumsum(dim=1) - probabilities < sampling.top_p).sum(dim=1, keepdim=True).clamp(min=1)
    least = ordered.gather(1, count - 1)
    above, equal = whole > least, whole == least
    kept = above | equal & (equal.cumsum(dim=1) <= count - above.sum(dim=1, keepdim=True))
    rank = 0 if group is None else group.rank()
    return kept.chunk(len(shards), dim=1)[rank]


def _largest(x: Tensor, count: int) -> Tensor:
    """[B, count] the largest of each row, falling."""
    if count < x.shape[1]:
        return x.topk(count, dim=1).values
    if x.device.type == "cpu":  # without places, numpy sorts many times faster
        return torch.from_numpy(np.sort(x.numpy(), axis=1)).flip(1)
    return x.sort(dim=1, descending=True).values


def _gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[p, ...] of the x of all ranks."""
    if group is None:
        return x[None]
    everyone = x.new_empty((group.size() * len(x), *x.shape[1:]))
    dist.all_gather_into_tensor(everyone, x.contiguous(), group=group)
    return everyone.unflatten(0, (group.size(), -1))


__all__ = ["draw", "gumbel", "sample_key"]
