"""The value function of PPO: a model of the policy's architecture whose output layer gives one number a token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megapsft.types import Microbatch, TrainBatch


class ValueHead(torch.nn.Module):
    """Linear map to a scalar, the same on all tensor-parallel ranks; zero at first, so that every value is 0."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.sequence_parallel = config.sequence_parallel
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """[S, B, D] (or its sequence-parallel shard) -> [S, B, 1] fp32. Called as Megatron calls its output layer."""
        if self.sequence_parallel:  # all ranks compute the same from here on, so each keeps its slice of the gradient
            input_ = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=False)
        return input_.float() @ self.weight.float().T, None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        return make_sharded_tensors_for_checkpoint({"weight": self.weight}, prefix, {}, sharded_offsets)


def with_value_heads(chunks: Sequence[GPTModel], config: TransformerConfig) -> None:
    """Make critics of models whose weights are imported already."""
    for gpt in chunks:
        gpt.share_embeddings_and_output_weights = False
        if gpt.post_process:
            gpt.output_layer = ValueHead(config).to(next(gpt.parameters()).device)


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

