"""What the ranks know of tokens, by sample: the same table on every rank, however samples were packed and split."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megapsft.types import Microbatch, TrainBatch


def gather_samples(batch: TrainBatch, tokens: Sequence[Sequence[Tensor]], has_head: bool, device: torch.device) -> list[Tensor]:
    """What stands at every token of every sample of the step, on every rank: [samples, longest] fp64 for each minibatch.

    Args:
        tokens: [B, S] of each microbatch of each minibatch of this rank.
        has_head: whether this rank's part counts: it is on the last pipeline stage.

    Returns:
        By (sample of the update, position in its sequence); 0 beyond the end.
    """
    counts = has_head and parallel_state.get_tensor_model_parallel_rank() == 0
    lengths = [max(int(m.position_ids.max()) + 1 for m in minibatch.microbatches) for minibatch in batch.minibatches]
    longest = torch.tensor(lengths, device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    tables = []
    for number, (minibatch, length) in enumerate(zip(batch.minibatches, longest.tolist(), strict=True)):
        table = torch.zeros(minibatch.samples, length, dtype=torch.float64, device=device)
        for microbatch, values in zip(minibatch.microbatches, tokens[number] if counts else (), strict=False):
            there = microbatch.loss_mask.to(device)
            ids, positions = microbatch.sample_ids.to(device)[there], microbatch.position_ids.to(device)[there]
            table[ids, positions] = values.to(device)[there].double()
        dist.all_reduce(table)
        tables.append(table)
    return tables


def at_positions(table: Tensor, microbatch: Microbatch) -> Tensor:
    """[B, S] fp32 of this rank's tokens out of a table of `gather_samples`; 0 on what is not trained."""
    there = microbatch.loss_mask.to(table.device)
    values = torch.zeros(there.shape, dtype=torch.float32, device=table.device)
    ids, positions = microbatch.sample_ids.to(table.device)[there], microbatch.position_ids.to(table.device)[there]
    values[there] = table[ids, positions].float()
    return values


__all__ = ["at_positions", "gather_samples"]
