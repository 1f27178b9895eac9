"""The types that cross borders between packages. No logic, no I/O.

Shapes: B rows, S positions. A *packed* microbatch has B = 1 and its S positions hold whole sequences end to end (THD);
an unpacked one holds one sequence a row. Position s of `labels`, `loss_mask`, `logprobs`, ... belongs to the prediction
*of the next token*: labels[s] == token_ids[s + 1] within a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import numpy as np
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One tokenised sequence: a prompt with a demonstration, with one side of a preference, or with a rollout."""

    token_ids: np.ndarray  # [n] int32
    loss_mask: np.ndarray  # [n] bool: True where the token itself is a training target
    source: str  # "file:line", for messages
    demonstration: bool = True  # False: a policy sampled it
    reward: float = 0.0
    advantage: float = 0.0  # from the rewards of the sample's group
    rollout_logprobs: np.ndarray | None = None  # [n] fp32, of the engine that sampled; 0 outside the response
    ref_logprobs: np.ndarray | None = None  # [n] fp32, computed beforehand; 0 outside the response
    routed_experts: np.ndarray | None = None  # [n, MoE layers, K] int16, of the engine that sampled; -1 where it routed nothing

    def __len__(self) -> int:
        return len(self.token_ids)


Group = tuple[Sample, ...]
"""What a source deals out at once: a demonstration alone, (chosen, rejected), or all rollouts of one prompt."""


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
    samples: int  # of the update, all ranks
    demonstration: Tensor  # [B, S] bool: of a demonstration, not of a rollout
    rewards: Tensor  # [B, S] fp32: of the sample
    advantages: Tensor  # [B, S] fp32: of the sample, or of the token
    rollout_logprobs: Tensor | None = None  # [B, S] fp32, of the engine that sampled
    old_logprobs: Tensor | None = None  # [B, S] fp32, policy at the start of the step
    old_entropy: Tensor | None = None  # [B, S] fp32
    ref_logprobs: Tensor | None = None  # [B, S] fp32, the frozen reference policy
    ref_hidden: Tensor | None = None  # [S (/ tp under sequence parallelism), B, D]: what the reference's output layer reads
    entropy: Tensor | None = None  # [B, S] fp32, policy just before the update
    values: Tensor | None = None  # [B, S] fp32, the critic at the start of the step
    returns: Tensor | None = None  # [B, S] fp32
    totals: Mapping[str, float] = field(default_factory=dict)  # what `Objective.totals` summed to, over the update and all ranks
    context_group: ProcessGroup | None = None  # the ranks that hold the other slices; None where this is all
    routing: Mapping[int, Tensor] | None = None  # MoE layer -> [tokens, K] experts of the old pass, to be chosen again
    rollout_routing: Tensor | None = None  # [B, S, MoE layers, K] int16, of the engine, to be chosen again; -1: free choice


@dataclass(frozen=True, kw_only=True)
class Minibatch:
    """One optimizer update on one data-parallel rank; the totals are over all ranks."""

    microbatches: tuple[Microbatch, ...]
    trained_tokens: int  # sum of loss_mask over the update, all ranks
    forward_tokens: int  # positions that go through the model, padding included, all data-parallel ranks
    real_tokens: int  # positions that are not padding, all ranks
    squared_lengths: int  # sum over all samples of the square of their tokens: what attention computes
    samples: int


@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """One step: the batch of the source, cut in order into the minibatches of its updates."""

    minibatches: tuple[Minibatch, ...]


@dataclass(frozen=True, kw_only=True)
class VocabularyTerm:
    """A quantity of each token over the full vocabulary, which the head computes beside the log-probability.

    With z = logits / temperature, p = softmax(z), and q the reference's softmax (the KLs) or sg(softmax(z / beta)) (GEM):

        reverse_kl   sum_v p_v (log p_v - log q_v)
        forward_kl   sum_v q_v (log q_v - log p_v)
        gem          sum_v q_v h_v (log p_v - log p_y), h = 1 (linear) or sg(sigmoid(0.01 (z_v - z_y))) (logsigmoid)
    """

    kind: Literal["reverse_kl", "forward_kl", "gem"]
    beta: float = 1.0  # gem only
    h: Literal["linear", "logsigmoid"] = "linear"  # gem only


@dataclass(frozen=True, kw_only=True)
class PolicyOutput:
    """The policy on one microbatch, teacher-forced."""

    logprobs: Tensor  # [B, S] fp32, gradient
    entropy: Tensor  # [B, S] fp32, full vocabulary, nats; garbage where masked; gradient where `entropy_gradient` asks for it
    term: Tensor | None = None  # [B, S] fp32, gradient: the objective's VocabularyTerm


Over = Literal["mean", "sum", "max", "min", "p01", "p50", "p99"]


@dataclass(frozen=True)
class Metric:
    """A per-token metric, still a tensor; reduced over the whole update when the update ends.

    With the weights w (1 on trained tokens, 0 elsewhere, unless given): sum = sum of w x, mean = sum of w x / sum of w, max and
    min over the tokens with w > 0, p01, p50 and p99 the 1 %, 50 % and 99 % quantiles by weight (`metrics/quantile.py`).
    """

    values: Tensor  # [B, S]
    over: Over = "mean"
    weights: Tensor | None = None  # [B, S]


@dataclass(frozen=True, kw_only=True)
class AdvantageOptions:
    """How rewards become the advantages that an objective wants."""

    estimator: Literal["group", "rloo", "gae"]
    norm_by_std: bool = True  # group
    singleton: Literal["raw", "zero"] = "raw"  # group and rloo: the advantage of a group of one
    demonstrations: bool = True  # group and rloo: a demonstration counts as a rollout of its group; where not, it has none
    gamma: float = 1.0  # gae
    lam: float = 1.0  # gae
    whiten: bool = True  # gae
    kl_coef: float = 0.0  # gae: taken off the reward of each token, times old_logprobs - ref_logprobs


class Objective(Protocol):
    """What is minimised: per-token losses, never reduced over tokens or ranks here."""

    needs: frozenset[str]  # fields of Microbatch that it reads beside those of every microbatch
    totals_need: frozenset[str] | None  # fields that `totals` reads; None where it counts nothing
    metrics: ClassVar[Mapping[str, Over]]  # every key it reports, and how it is reduced
    critic: ClassVar[bool]  # whether a value function is trained beside the policy, by `value_loss` and its `value_metrics`
    trains_on: ClassVar[frozenset[str]]  # of {"demonstrations", "preferences", "rollouts"}
    aggregation: str
    max_response_length: int | None
    entropy_gradient: bool
    term: VocabularyTerm | None
    advantages: AdvantageOptions | None
    clip_range: tuple[float | None, float | None]  # ratios are clipped at 1 - low and 1 + high; None: not on that side

    def keep(self, rewards: Sequence[float], demonstrations: Sequence[bool]) -> Sequence[bool]: ...

    def totals(self, batch: Microbatch) -> Mapping[str, Tensor]: ...

    def __call__(self, output: PolicyOutput, batch: Microbatch) -> tuple[Tensor, Mapping[str, Metric]]: ...


__all__ = [
    "AdvantageOptions",
    "Group",
    "Metric",
    "Microbatch",
    "Minibatch",
    "Objective",
    "Over",
    "PolicyOutput",
    "Sample",
    "TrainBatch",
    "VocabularyTerm",
]
