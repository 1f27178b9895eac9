"""How far the logits of one model are from those of another, token by token, without holding all of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megapsft.policy.head.statistics import finish, merge, nothing, statistics
from megapsft.types import VocabularyTerm

CHANNELS = ("logits_rms", "logits_max", "kl", "same_top")
KL = VocabularyTerm(kind="reverse_kl")


@torch.no_grad()
def compare_logits(
    hidden: Tensor,
    weight: Tensor,
    finer_hidden: Tensor,
    finer_weight: Tensor,
    group: dist.ProcessGroup | None,
    valid_vocab: int,
    chunk_bytes: int,
    temperature: float = 1.0,
) -> Tensor:
    """[4, T] fp64, the same on every rank of `group`. With z the logits and r the finer ones, over the true vocabulary:

        logits_rms   |z - r| / |r|, of Euclidean norms
        logits_max   max |z - r| / max |r|
        kl           sum_v p_v (log p_v - log q_v) in nats, p of z and q of r
        same_top     1 where no word has a larger z than the word of the largest r, else 0

    Args:
        hidden: [T, D] that the output layer reads, of any dtype; products are in it, as of the model that it comes from.
        weight: [V / p, D], this rank's rows of the padded vocabulary.
        finer_hidden: [T, D'] and `finer_weight` [V / p, D'], of the other model.
        chunk_bytes: of the fp64 logits of some tokens; several are held at once.
        temperature: divides the logits of both.
    """
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    columns = max(0, min(valid_vocab - rank * len(weight), len(weight)))
    height = max(1, chunk_bytes // (8 * max(1, columns)))
    parts = hidden.new_zeros(7 + len(nothing(0, KL, hidden, torch.float64)), len(hidden), dtype=torch.float64)
    parts[4:7] = -torch.inf
    parts[7:] = nothing(len(hidden), KL, hidden, torch.float64)
    for start in range(0, len(hidden) if columns else 0, height):
        rows = slice(start, start + height)
        z, r = ((h[rows] @ w[:columns].T).double() / temperature for h, w in ((hidden, weight), (finer_hidden, finer_weight)))
        parts[:, rows] = _part(z, r)
    if size > 1:
        everyone = parts.new_empty(size * len(parts), parts.shape[1])
        dist.all_gather_into_tensor(everyone, parts, group=group)
        parts = everyone.view(size, *parts.shape)
    else:
        parts = parts[None]
    difference, reference, *_ = parts[:, :2].sum(dim=0)
    largest_difference, largest = parts[:, 2:4].amax(dim=0)
    winner = parts[:, 4].argmax(dim=0, keepdim=True)
    same_top = parts[:, 5].gather(0, winner)[0] >= parts[:, 6].amax(dim=0)
    kl = finish(merge(parts[:, 7:], KL), KL)[-1]
    tiny = torch.finfo(torch.float64).tiny
    rms = (difference / reference.clamp(min=tiny)).sqrt()
    return torch.stack([rms, largest_difference / largest.clamp(min=tiny), kl, same_top.double()])


def _part(z: Tensor, r: Tensor) -> Tensor:
    """[channels, n] of some columns, to be put together over ranks: sums, maxima, largest r, its z, largest z, and the KL's."""
    difference = z - r
    top = r.max(dim=1)
    of_top = z.gather(1, top.indices[:, None])[:, 0]
    found = [difference.square().sum(1), r.square().sum(1), difference.abs().amax(1), r.abs().amax(1)]
    found += [top.values, of_top, z.amax(1)]
    nowhere = torch.full((len(z),), -1, device=z.device)  # there is no label
    return torch.cat([torch.stack(found), statistics(z, r, nowhere, None, KL)])


__all__ = ["CHANNELS", "compare_logits"]
