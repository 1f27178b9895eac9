"""A precision beside a finer one: the same weights and samples, and what the rounding does to every trained token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megapsft.config import Config
from megapsft.policy.build import Policy
from megapsft.policy.head.compare import CHANNELS, compare_logits
from megapsft.policy.hidden import trained_hidden
from megapsft.train.noise import Bench
from megapsft.train.plan import RunPlan


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What was measured of each trained token, [tokens] fp64, by sample and position: as of `compare_logits`."""

    name: str
    finer: str  # what it is compared with
    logprob: np.ndarray  # |log-probability - the finer one's|, nats
    logits_rms: np.ndarray
    logits_max: np.ndarray
    kl: np.ndarray  # nats; of it against the finer one
    same_top: float  # share of tokens whose likeliest next word is the same


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """One model's end of the comparison, on the host."""

    name: str
    logprobs: Tensor  # [trained tokens] fp64, as of `Passed`
    hidden: Sequence[Sequence[Tensor]]  # [n, D] of the trained tokens of each microbatch of each minibatch; empty without a head
    weight: Tensor | None  # [V / p, D]


def name_of(config: Config) -> str:
    """Of the precision that a run computes in."""
    return config.model.dtype if config.fp8.format is None else f"FP8 ({config.fp8.format}, {config.fp8.recipe})"


@torch.no_grad()
def outputs_of(bench: Bench, policy: Policy, laid_out: RunPlan, name: str, logprobs: Tensor) -> Outputs:
    """Collective. What the head of `policy` reads, of samples laid out as `laid_out` says."""
    hidden = []
    for minibatch in bench.batch(laid_out).minibatches:
        hidden.append([one.cpu() for one in trained_hidden(policy, minibatch)])
    weight = policy.output_weight()
    return Outputs(name=name, logprobs=logprobs, hidden=hidden, weight=None if weight is None else weight.detach().cpu())


def compare(bench: Bench, policy: Policy, laid_out: RunPlan, ours: Outputs, finer: Outputs) -> Precision:
    """Collective. `ours` beside `finer`; `policy` is either of the two, and lends its head's place among the ranks."""
    batch, head, device = bench.batch(laid_out), policy.head(), policy.device
    weights = [None if one.weight is None else one.weight.to(device) for one in (ours, finer)]
    found: list[list[Tensor]] = []
    for minibatch, mine, theirs in zip(batch.minibatches, ours.hidden, finer.hidden, strict=True):
        found.append([])
        for microbatch, hidden, finer_hidden in zip(minibatch.microbatches, mine, theirs, strict=False):
            place = torch.zeros(len(CHANNELS), *microbatch.loss_mask.shape, dtype=torch.float64, device=device)
            place[:, microbatch.loss_mask.to(device)] = compare_logits(
                hidden.to(device), weights[0], finer_hidden.to(device), weights[1], head.tp_group, head.valid_vocab,
                head.chunk_bytes, policy.temperature,
            )  # fmt: skip
            found[-1].append(place)
    channels = {
        name: bench.by_token(batch, [[place[number] for place in one] for one in found], policy).numpy()
        for number, name in enumerate(CHANNELS)
    }
    same_top = float(channels.pop("same_top").mean())
    logprob = (ours.logprobs - finer.logprobs).abs().numpy()
    return Precision(name=ours.name, finer=finer.name, logprob=logprob, same_top=same_top, **channels)


__all__ = ["Outputs", "Precision", "compare", "name_of", "outputs_of"]
