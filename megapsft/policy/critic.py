"""The value function of PPO: a model of the policy's architecture whose output layer gives one number a token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor


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
