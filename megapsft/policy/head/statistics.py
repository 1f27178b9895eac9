"""What must be known of a token's logits z, and how what is known of two parts of the vocabulary becomes one.

Every sum is held relative to the largest logit seen so far, so none overflows; merging two parts rescales to the larger of both.
The parts are slabs of one rank's rows, and then the shards of all tensor-parallel ranks. With p = softmax(z), q the softmax of
the reference's logits r (the KLs) or of z / beta (GEM):

    kind of sum   over v of              rescaled by
    p             exp(z - top) x         exp(top - new top)
    r             exp(r - ref_top) x     exp(ref_top - new ref_top)
    q             exp((z - top)/beta) x  exp((top - new top)/beta)
    plain         x                      1
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megapsft.types import VocabularyTerm

BASE = {"top": "top", "total": "p", "weighted": "p", "target": "plain"}  # of weighted x = z; the label's z, where it is
TERMS = {
    None: {},
    "reverse_kl": {"ref_top": "ref_top", "ref_total": "r", "crossed": "p"},  # x = r
    "forward_kl": {"ref_top": "ref_top", "ref_total": "r", "ref_weighted": "r", "crossed": "r"},  # x = r; x = z
    "gem": {"q_total": "q", "q_h": "q", "q_hz": "q"},  # x = 1; x = h; x = h z
}
SLOPE = 0.01  # of GEM's logsigmoid, as in its authors' code


@dataclass(frozen=True)
class Known:
    """Per token, [T] each, of the whole vocabulary; what the backward pass needs beside the logits."""

    lse: Tensor  # logsumexp z
    mean: Tensor  # sum_v p_v z_v
    target: Tensor  # z of the label
    other: Tensor | None = None  # logsumexp of r, or of z / beta
    level: Tensor | None = None  # reverse_kl: sum_v p_v (z_v - r_v); gem: sum_v q_v h_v

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.lse, self.mean, self.target, self.other, self.level


def channels(term: VocabularyTerm | None) -> dict[str, str]:
    """Name -> kind of sum, in the order of the rows of a [channels, T] tensor."""
    return BASE | TERMS[term.kind if term else None]


def merge(parts: Tensor, term: VocabularyTerm | None) -> Tensor:
    """[parts, channels, T] -> [channels, T]; the same on every rank that has the same parts in the same order."""
    kinds = channels(term)
    names = list(kinds)
    top = parts[:, names.index("top")]
    new_top = top.amax(dim=0)
    scales = {"p": (top - new_top).exp(), "plain": torch.ones_like(top)}
    if "ref_top" in kinds:
        ref_top = parts[:, names.index("ref_top")]
        new_ref_top = ref_top.amax(dim=0)
        scales["r"] = (ref_top - new_ref_top).exp()
    if "q_total" in kinds:
        scales["q"] = ((top - new_top) / term.beta).exp()
    rows = []
    for row, kind in enumerate(kinds.values()):
        if kind in ("top", "ref_top"):
            rows.append(new_top if kind == "top" else new_ref_top)
        else:
            rows.append((parts[:, row] * scales[kind]).sum(dim=0))
    return torch.stack(rows)


def nothing(tokens: int, term: VocabularyTerm | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    """[channels, T] of no part of the vocabulary at all: merging it changes nothing."""
    stats = like.new_zeros(len(channels(term)), tokens, dtype=dtype)
    for row, kind in enumerate(channels(term).values()):
        if kind in ("top", "ref_top"):
            stats[row] = torch.finfo(dtype).min
    return stats


def finish(stats: Tensor, term: VocabularyTerm | None) -> tuple[Known, Tensor, Tensor, Tensor | None]:
    """Of the statistics of the whole vocabulary: what is known, log-probability, entropy and term, [T] each."""
    of = dict(zip(channels(term), stats, strict=True))
    lse = of["top"] + of["total"].log()
    mean = of["weighted"] / of["total"]
    known = Known(lse, mean, of["target"])
    value = None
    if term is not None and term.kind == "gem":
        level = of["q_h"] / of["q_total"]
        known = Known(lse, mean, of["target"], of["top"] / term.beta + of["q_total"].log(), level)
        value = of["q_hz"] / of["q_total"] - of["target"] * level
    elif term is not None:
        other = of["ref_top"] + of["ref_total"].log()
        if term.kind == "reverse_kl":
            level = mean - of["crossed"] / of["total"]
            known = Known(lse, mean, of["target"], other, level)
            value = level - lse + other
        else:
            known = Known(lse, mean, of["target"], other)
            value = (of["ref_weighted"] - of["crossed"]) / of["ref_total"] - other + lse
    return known, of["target"] - lse, lse - mean, value


def statistics(z: Tensor, ref: Tensor | None, labels: Tensor, known_target: Tensor | None, term: VocabularyTerm | None) -> Tensor:
    """[channels, n] of one part of the vocabulary.

    Args:
        z: [n, columns] fp32 (or fp64) logits of these columns, temperature applied; overwritten.
        ref: [n, columns] of the reference, likewise.
        labels: [n] int64, columns of the labels; out of range where the label lies elsewhere.
        known_target: [n] the label's z, where GEM's h needs it.
    """
    top = z.amax(dim=1)
    mine = (labels >= 0) & (labels < z.shape[1])
    target = torch.where(mine, z.gather(1, labels.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1), 0)
    found = {"top": top, "target": target}
    if term is not None and term.kind == "gem":
        h = torch.ones_like(z) if term.h == "linear" else torch.sigmoid(SLOPE * (z - known_target[:, None]))
        q = ((z - top[:, None]) / term.beta).exp_()
        found["q_total"] = q.sum(dim=1)
        q.mul_(h)
        found |= {"q_h": q.sum(dim=1), "q_hz": q.mul_(z).sum(dim=1)}
    elif term is not None:
        ref_top = ref.amax(dim=1)
        q = (ref - ref_top[:, None]).exp_()
        found |= {"ref_top": ref_top, "ref_total": q.sum(dim=1)}
        if term.kind == "forward_kl":
            found |= {"ref_weighted": (q * ref).sum(dim=1), "crossed": (q * z).sum(dim=1)}
    p = (z - top[:, None]).exp_()
    found["total"] = p.sum(dim=1)
    if term is not None and term.kind == "reverse_kl":
        found["crossed"] = ref.mul_(p).sum(dim=1)
    found["weighted"] = z.mul_(p).sum(dim=1)
    return torch.stack([found[name] for name in channels(term)])


@dataclass(frozen=True)
class Wanted:
    """Gradients of the loss in the head's outputs, [T] each, already divided by the temperature; None where there is none."""

    logprobs: Tensor | None
    entropy: Tensor | None
    term: Tensor | None


def gradient(z: Tensor, ref: Tensor | None, labels: Tensor, known: Known, wanted: Wanted, term: VocabularyTerm | None) -> Tensor:
    """[n, columns] gradient in these logits, in the place of z.

    Args: as of `statistics`; `known` and `wanted` of the same n tokens.
    """
    at_label = torch.zeros_like(known.lse)
    extra = None
    if wanted.term is not None and term.kind == "gem":
        h = None if term.h == "linear" else torch.sigmoid(SLOPE * (z - known.target[:, None]))
        extra = (z / term.beta - known.other[:, None]).exp_().mul_(wanted.term[:, None])
        extra = extra if h is None else extra.mul_(h)
        at_label = at_label - wanted.term * known.level
    elif wanted.term is not None and term.kind == "forward_kl":
        extra = (ref - known.other[:, None]).exp_().mul_(-wanted.term[:, None])
    factor = None  # of p, beside what does not depend on the column
    constant = torch.zeros_like(known.lse)
    if wanted.logprobs is not None:
        constant, at_label = constant - wanted.logprobs, at_label + wanted.logprobs
    if wanted.entropy is not None:
        factor = (z - known.mean[:, None]).mul_(-wanted.entropy[:, None])
    if wanted.term is not None and term.kind == "reverse_kl":
        slope = (z - ref).sub_(known.level[:, None]).mul_(wanted.term[:, None])
        factor = slope if factor is None else factor.add_(slope)
    elif wanted.term is not None and term.kind == "forward_kl":
        constant = constant + wanted.term
    p = z.sub_(known.lse[:, None]).exp_()
    if factor is None:
        p.mul_(constant[:, None])
    else:
        p.mul_(factor.add_(constant[:, None]))
    if extra is not None:
        p.add_(extra)
    mine = (labels >= 0) & (labels < p.shape[1])
    return p.scatter_add_(1, labels.clamp(0, p.shape[1] - 1)[:, None], torch.where(mine, at_label, 0)[:, None])
