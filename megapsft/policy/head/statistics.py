"""What must be known of a token's logits z, and how what is known of two parts of the vocabulary becomes one.

All is held relative to the largest logit seen so far: no sum overflows, and what the other words have beside a sure one is not
lost in the rounding of its large logit. Merging two parts moves both to the larger. With r the reference's logits:

    x = z - top    p = exp(x)    y = r - ref_top    q = exp(y) (the KLs), exp(x / beta) (GEM)

    total          sum p        weighted       sum p x        target   z of the label, where it is
    ref_total      sum q        ref_weighted   sum q y        crossed  sum p y (reverse KL), sum q x (forward KL)
    q_total        sum q        q_h            sum q h        q_hx     sum q h x
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megapsft.types import VocabularyTerm

BASE = ("top", "total", "weighted", "target")
TERMS = {
    None: (),
    "reverse_kl": ("ref_top", "ref_total", "crossed"),
    "forward_kl": ("ref_top", "ref_total", "ref_weighted", "crossed"),
    "gem": ("q_total", "q_h", "q_hx"),
}
SLOPE = 0.01  # of GEM's logsigmoid, as in its authors' code


@dataclass(frozen=True)
class Known:
    """Per token, [T] each, of the whole vocabulary; what the backward pass needs beside the logits."""

    top: Tensor  # the largest z
    total: Tensor
    mean: Tensor  # of x under p
    target: Tensor  # x of the label
    ref_top: Tensor | None = None  # the largest r
    other_total: Tensor | None = None  # ref_total, or q_total
    level: Tensor | None = None  # reverse_kl: the mean of x - y under p; gem: that of h under q

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.top, self.total, self.mean, self.target, self.ref_top, self.other_total, self.level


def channels(term: VocabularyTerm | None) -> tuple[str, ...]:
    """What the rows of a [channels, T] tensor are."""
    return BASE + TERMS[term.kind if term else None]


def merge(parts: Tensor, term: VocabularyTerm | None) -> Tensor:
    """[parts, channels, T] -> [channels, T]; the same on every rank that has the same parts in the same order."""
    of = dict(zip(channels(term), parts.unbind(1), strict=True))
    top = of["top"].amax(dim=0)
    move = of["top"] - top  # 0 or less: what is added to x
    shrink = move.exp()
    found = {
        "top": top,
        "total": (of["total"] * shrink).sum(dim=0),
        "weighted": ((of["weighted"] + move * of["total"]) * shrink).sum(dim=0),
        "target": of["target"].sum(dim=0),
    }
    if term is not None and term.kind == "gem":
        shrink = (move / term.beta).exp()
        found |= {name: (of[name] * shrink).sum(dim=0) for name in ("q_total", "q_h")}
        found["q_hx"] = ((of["q_hx"] + move * of["q_h"]) * shrink).sum(dim=0)
    elif term is not None:
        found["ref_top"] = of["ref_top"].amax(dim=0)
        ref_move = of["ref_top"] - found["ref_top"]
        ref_shrink = ref_move.exp()
        found["ref_total"] = (of["ref_total"] * ref_shrink).sum(dim=0)
        if term.kind == "reverse_kl":
            found["crossed"] = ((of["crossed"] + ref_move * of["total"]) * shrink).sum(dim=0)
        else:
            found["ref_weighted"] = ((of["ref_weighted"] + ref_move * of["ref_total"]) * ref_shrink).sum(dim=0)
            found["crossed"] = ((of["crossed"] + move * of["ref_total"]) * ref_shrink).sum(dim=0)
    return torch.stack([found[name] for name in channels(term)])


def nothing(tokens: int, term: VocabularyTerm | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    """[channels, T] of no part of the vocabulary at all: merging it changes nothing."""
    stats = like.new_zeros(len(channels(term)), tokens, dtype=dtype)
    for row, name in enumerate(channels(term)):
        if name in ("top", "ref_top"):
            stats[row] = torch.finfo(dtype).min
    return stats


def finish(stats: Tensor, term: VocabularyTerm | None) -> tuple[Known, Tensor, Tensor, Tensor | None]:
    """Of the statistics of the whole vocabulary: what is known, log-probability, entropy and term, [T] each."""
    of = dict(zip(channels(term), stats, strict=True))
    log_total, mean, target = of["total"].log(), of["weighted"] / of["total"], of["target"] - of["top"]
    ref_top = other_total = level = value = None
    if term is not None and term.kind == "gem":
        other_total, level = of["q_total"], of["q_h"] / of["q_total"]
        value = of["q_hx"] / other_total - target * level
    elif term is not None:
        ref_top, other_total = of["ref_top"], of["ref_total"]
        difference = log_total - other_total.log()
        if term.kind == "reverse_kl":
            level = (of["weighted"] - of["crossed"]) / of["total"]
            value = level - difference
        else:
            value = (of["ref_weighted"] - of["crossed"]) / other_total + difference
    known = Known(of["top"], of["total"], mean, target, ref_top, other_total, level)
    return known, target - log_total, log_total - mean, value


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
    x = z - top[:, None]
    if term is not None and term.kind == "gem":
        q = (x / term.beta).exp_()
        found["q_total"] = found["q_h"] = q.sum(dim=1)
        if term.h == "logsigmoid":
            found["q_h"] = q.mul_(torch.sigmoid(SLOPE * (x - (known_target - top)[:, None]))).sum(dim=1)
        found["q_hx"] = q.mul_(x).sum(dim=1)
    elif term is not None:
        found["ref_top"] = ref.amax(dim=1)
        y = ref.sub_(found["ref_top"][:, None])
        q = y.exp()
        found["ref_total"] = q.sum(dim=1)
        if term.kind == "forward_kl":
            found |= {"ref_weighted": y.mul_(q).sum(dim=1), "crossed": q.mul_(x).sum(dim=1)}
    p = torch.exp(x, out=z)
    found["total"] = p.sum(dim=1)
    if term is not None and term.kind == "reverse_kl":
        found["crossed"] = y.mul_(p).sum(dim=1)
    found["weighted"] = x.mul_(p).sum(dim=1)
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
    at_label, constant = torch.zeros_like(known.top), torch.zeros_like(known.top)
    extra = None
    x = z.sub_(known.top[:, None])
    y = None if ref is None else ref.sub_(known.ref_top[:, None])
    if wanted.term is not None and term.kind == "gem":
        extra = (x / term.beta).exp_().mul_((wanted.term / known.other_total)[:, None])
        if term.h == "logsigmoid":
            extra.mul_(torch.sigmoid(SLOPE * (x - known.target[:, None])))
        at_label = at_label - wanted.term * known.level
    elif wanted.term is not None and term.kind == "forward_kl":
        extra = y.exp_().mul_((-wanted.term / known.other_total)[:, None])
    factor = None  # of p, beside what does not depend on the column
    if wanted.logprobs is not None:
        constant, at_label = constant - wanted.logprobs, at_label + wanted.logprobs
    if wanted.entropy is not None:
        factor = (x - known.mean[:, None]).mul_((-wanted.entropy / known.total)[:, None])
    if wanted.term is not None and term.kind == "reverse_kl":
        slope = (x - y).sub_(known.level[:, None]).mul_((wanted.term / known.total)[:, None])
        factor = slope if factor is None else factor.add_(slope)
    elif wanted.term is not None and term.kind == "forward_kl":
        constant = constant + wanted.term
    constant = (constant / known.total)[:, None]
    p = x.exp_().mul_(constant if factor is None else factor.add_(constant))
    if extra is not None:
        p.add_(extra)
    mine = (labels >= 0) & (labels < p.shape[1])
    return p.scatter_add_(1, labels.clamp(0, p.shape[1] - 1)[:, None], torch.where(mine, at_label, 0)[:, None])
