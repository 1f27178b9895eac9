"""Samples of a step into the tensors of its updates.

An update (minibatch) is planned as a whole by every rank; then a rank fills in only the microbatches of its data-parallel
share, and of those its context-parallel slice. What is trained, and with which weight, does not depend on the split.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.distributed import ProcessGroup

from megapsft.data.loss_weights import loss_weights
from megapsft.data.plan import Layout, Plan, plan_update, round_up
from megapsft.types import Group, Microbatch, Minibatch, Sample, TrainBatch


def pack(
    groups: Sequence[Group],
    *,
    minibatch_size: int,
    layout: Layout,
    aggregation: str,
    max_response_length: int | None = None,
    pad_token_id: int,
    together: bool = False,
    context_group: ProcessGroup | None = None,
) -> TrainBatch:
    """This rank's part of one step.

    The groups are cut in order into minibatches of `minibatch_size` groups; the last may be smaller. Loss weights are those of
    `loss_weights` over a whole minibatch, all ranks: the loss of an update is the plain sum of weight * per-token loss.

    Args:
        together: all samples of a group go into the same microbatch (preferences); groups are then equally large.
        context_group: the ranks that hold the other context-parallel slices, for sums over whole samples.

    Raises:
        Refused: as `loss_weights`.
    """
    minibatches = []
    for start in range(0, len(groups), minibatch_size):
        update = [sample for group in groups[start : start + minibatch_size] for sample in group]
        targets = [sample.loss_mask[1:] for sample in update]  # by the position that predicts; nothing predicts a first token
        weights = loss_weights(targets, aggregation, max_response_length)
        plans = plan_update([len(sample) for sample in update], layout, len(groups[start]) if together else 1)
        minibatches.append(
            Minibatch(
                microbatches=tuple(
                    fill(plan, update, weights, layout, pad_token_id, context_group)
                    for plan in plans[layout.data_parallel_rank]
                ),
                trained_tokens=int(sum(target.sum() for target in targets)),
                forward_tokens=sum(len(plan.rows) * plan.length for share in plans for plan in share),
                real_tokens=sum(len(sample) for sample in update),
                squared_lengths=sum(len(sample) ** 2 for sample in update),
                samples=len(update),
            )
        )
    return TrainBatch(minibatches=tuple(minibatches))


def fill(
    plan: Plan,
    samples: Sequence[Sample],
    weights: Sequence[np.ndarray],
    layout: Layout,
    pad_token_id: int,
    context_group: ProcessGroup | None = None,
) -> Microbatch:
    """The tensors of one planned microbatch, sliced for this context-parallel rank.

    Args:
        samples: of the update; `plan.rows` are indices into it.
        weights: [n - 1] fp32 of each sample, by the position that predicts.
    """
    shape = (len(plan.rows), plan.length)
    token_ids = np.full(shape, pad_token_id, dtype=np.int64)
    labels = np.zeros(shape, dtype=np.int64)
    loss_mask = np.zeros(shape, dtype=bool)
    sample_ids = np.full(shape, -1, dtype=np.int64)
    per_token = {"loss_weights": np.zeros(shape, dtype=np.float32)}
    for name in ("rollout_logprobs", "ref_logprobs"):
        if getattr(samples[0], name) is not None:  # all samples have them, or none
            per_token[name] = np.zeros(shape, dtype=np.float32)
    routed = [sample.routed_experts for sample in samples if sample.routed_experts is not None]  # all microbatches are alike
    rollout_routing = np.full((*shape, *routed[0].shape[1:]), -1, dtype=np.int16) if routed else None
    borders = [0]  # between sequences; an unpacked row is one sequence
    for row, members in enumerate(plan.rows):
        start = 0
        for i in members:
            sample, end = samples[i], start + len(samples[i])
            token_ids[row, start:end] = sample.token_ids
            sample_ids[row, start:end] = i
            labels[row, start : end - 1] = np.where(sample.loss_mask[1:], sample.token_ids[1:], 0)
            loss_mask[row, start : end - 1] = sample.loss_mask[1:]
            if sample.routed_experts is not None:
                rollout_routing[row, start:end] = sample.routed_experts
            for name, tokens in per_token.items():
                tokens[row, start : end - 1] = weights[i] if name == "loss_weights" else getattr(sample, name)[1:]
            start += round_up(len(sample), layout.sequence_multiple)
            if layout.packing:
                borders.append(start)
    if borders[-1] < plan.length:
        borders.append(plan.length)  # what is left of a pack is a sequence of padding

    cu_seqlens = np.array(borders, dtype=np.int32)
    sequences = np.diff(cu_seqlens)
    position_ids = np.arange(plan.length) - np.repeat(cu_seqlens[:-1], sequences)
    rank, size = layout.context_parallel_rank, layout.context_parallel_size
    mine = np.concatenate([start + zigzag(n, rank, size) for start, n in zip(borders[:-1], sequences, strict=True)])

    def own(positions: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(positions[:, mine]))

    def of_samples(values: list[float], padding: float, dtype: type) -> torch.Tensor:
        return own(np.array([*values, padding], dtype=dtype)[sample_ids])  # padding has the index -1

    return Microbatch(
        token_ids=own(token_ids),
        labels=own(labels),
        position_ids=own(np.broadcast_to(position_ids, shape)),
        loss_mask=own(loss_mask),
        sample_ids=own(sample_ids),
        cu_seqlens=torch.from_numpy(cu_seqlens) if layout.packing else None,
        max_seqlen=int(sequences.max()),
        samples=len(samples),
        context_group=context_group,
        demonstration=of_samples([sample.demonstration for sample in samples], False, bool),
        rewards=of_samples([sample.reward for sample in samples], 0.0, np.float32),
        advantages=of_samples([sample.advantage for sample in samples], 0.0, np.float32),
        rollout_routing=None if rollout_routing is None else own(rollout_routing),
        **{name: own(tokens) for name, tokens in per_token.items()},
    )


def zigzag(length: int, rank: int, size: int) -> np.ndarray:
    """Positions of a sequence that context-parallel rank `rank` of `size` holds: [length / size] int64, ascending.

    The sequence is cut into 2 * size chunks and a rank holds one from each end, because under a causal mask late positions
    cost more than early ones.

    Args:
        length: a multiple of 2 * size; any where size is 1.

    Example:
        >>> zigzag(8, 0, 2), zigzag(8, 1, 2)
        (array([0, 1, 6, 7]), array([2, 3, 4, 5]))
    """
    if size == 1:
        return np.arange(length)
    chunks = np.arange(length).reshape(2 * size, -1)
    return np.concatenate([chunks[rank], chunks[2 * size - 1 - rank]])


__all__ = ["Layout", "fill", "pack", "zigzag"]
