"""The types that cross borders between packages. No logic, no I/O.

Shapes: B rows, S positions. A *packed* microbatch has B = 1 and its S positions hold whole sequences end to end (THD);
an unpacked one holds one sequence a row. Position s of `labels`, `loss_mask`, `logprobs`, ... belongs to the prediction
*of the next token*: labels[s] == token_ids[s + 1] within a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One tokenised row: prompt and demonstration."""

    token_ids: np.ndarray  # [n] int32
    loss_mask: np.ndarray  # [n] bool: True where the token itself is a training target
    source: str  # "file:line", for messages

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """What one rank feeds to one forward pass: its context-parallel slice."""

    token_ids: Tensor  # [B, S] int64
    labels: Tensor  # [B, S] int64, 0 where masked
    position_ids: Tensor  # [B, S] int64, position within the sequence
    loss_mask: Tensor  # [B, S] bool
    loss_weights: Tensor  # [B, S] fp32: loss = sum of loss_weights * per-token loss over the whole update
    sample_ids: Tensor  # [B, S] int64: index of the sample within the update, -1 on padding
    cu_seqlens: Tensor | None  # [n + 1] int32 over the whole (not sliced) pack, padding included; None where unpacked
    max_seqlen: int  # longest (padded) sequence of the pack
    old_logprobs: Tensor | None = None  # [B, S] fp32, policy at the start of the step
    old_entropy: Tensor | None = None  # [B, S] fp32


@dataclass(frozen=True, kw_only=True)
class Minibatch:
    """One optimizer update on one data-parallel rank; the totals are over all ranks."""

    microbatches: tuple[Microbatch, ...]
    trained_tokens: int  # sum of loss_mask over the update, all ranks
    forward_tokens: int  # positions that go through the model, padding included, all data-parallel ranks
    real_tokens: int  # positions that are not padding, all ranks
    samples: int


@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """One step: the batch of the source, cut in order into the minibatches of its updates."""

    minibatches: tuple[Minibatch, ...]


@dataclass(frozen=True, kw_only=True)
class PolicyOutput:
    """The policy on one microbatch, teacher-forced."""

    logprobs: Tensor  # [B, S] fp32, gradient
    entropy: Tensor  # [B, S] fp32, full vocabulary, nats; garbage where masked


@dataclass(frozen=True)
class Metric:
    """A per-token metric, still a tensor; reduced over the trained tokens of the whole update when the update ends."""

    values: Tensor  # [B, S]
    over: Literal["mean", "max", "min"] = "mean"


class Objective(Protocol):
    """What is minimised: per-token losses, never reduced over tokens or ranks here."""

    needs: frozenset[str]  # of {"old_logprobs", "old_entropy"}
    metrics: ClassVar[Mapping[str, Literal["mean", "max", "min"]]]  # every key it reports, and how it is reduced
    aggregation: str
    max_response_length: int | None
    selects: bool  # whether `select` names fewer tokens than the loss mask, to which loss_weights are renormalised

    def select(self, batch: Microbatch) -> Tensor | None: ...

    def __call__(self, output: PolicyOutput, batch: Microbatch) -> tuple[Tensor, Mapping[str, Metric]]: ...


__all__ = ["Metric", "Microbatch", "Minibatch", "Objective", "PolicyOutput", "Sample", "TrainBatch"]
