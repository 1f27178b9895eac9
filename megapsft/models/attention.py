"""Core attention without Transformer Engine: packed sequences (THD) and context parallelism on torch's SDPA.

Megatron's own local attention knows neither. Sequences of a pack never see each other: each is attended to by itself, so the
work is the sum of the squares of the lengths, not the square of the sum.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class SDPAttention(MegatronModule):
    """Causal self-attention, grouped queries, no dropout.

    Context parallelism: queries stay, keys and values are all-gathered over the group (backward: reduce-scatter). Each rank
    holds of every sequence the chunks `rank` and `2 cp - 1 - rank` of 2 cp equal chunks (zigzag: equal work for all ranks).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **newer: Any,
    ):
        super().__init__(config=config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.cp_group = groups.cp
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [S, B, heads, d], or [T, heads, d] where packed; key, value: the same with the key-value heads.
            packed_seq_params: cu_seqlens of the whole pack, before it was sliced over context-parallel ranks.

        Returns:
            [S, B, heads * d], or [T, heads * d] where packed.
        """
        cp, rank = self.cp_group.size(), self.cp_group.rank()
        packed = packed_seq_params is not None
        if packed:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            offsets = packed_seq_params.cu_seqlens_q.tolist()
            lengths = [(end - start) // cp for start, end in zip(offsets, offsets[1:], strict=False)]
        else:
            lengths = [query.shape[0]]
        if cp > 1:
            both = gather_from_sequence_parallel_region(torch.cat((key, value), dim=-1), group=self.cp_group)  # one message
            key, value = both.split((key.shape[-1], value.shape[-1]), dim=-1)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [B, heads, S, d]
        if query.shape[1] != key.shape[1]:  # spelt out: SDPA's own enable_gqa leaves the fused CPU kernel
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        if cp == 1:  # split, not sliced: the backward of a slice fills a whole tensor of zeros
            parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
            outputs = [self._attend(q, k, v) for q, k, v in parts]
        else:
            outputs, starts = [], itertools.accumulate(lengths, initial=0)
            for q, start, length in zip(query.split(lengths, dim=2), starts, lengths, strict=False):
                k, v = (_in_order(x, start, length, cp) for x in (key, value))
                outputs.append(self._attend(q, k, v, _zigzag_mask(length, rank, cp, q.device)))
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        out = out.permute(2, 0, 1, 3).flatten(2)  # [S, B, heads * d]
        return out.squeeze(1) if packed else out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale)


def _in_order(x: Tensor, start: int, length: int, cp: int) -> Tensor:
    """One whole sequence in its natural order out of the gathered blocks of all ranks: [B, heads, cp * length, d]."""
    block, half = x.shape[2] // cp, length // 2
    first = [x[:, :, rank * block + start : rank * block + start + half] for rank in range(cp)]
    second = [x[:, :, rank * block + start + half : rank * block + start + length] for rank in reversed(range(cp))]
    return torch.cat(first + second, dim=2)


def _zigzag_mask(length: int, rank: int, cp: int, device: torch.device) -> Tensor:
    """[length, cp * length] bool: which keys, in natural order, the local queries may see."""
    half = length // 2
    local = torch.arange(half, device=device)
    queries = torch.cat([local + rank * half, local + (2 * cp - 1 - rank) * half])
    return queries[:, None] >= torch.arange(cp * length, device=device)[None]
