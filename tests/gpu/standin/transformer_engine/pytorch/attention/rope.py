"""Rotary positions of packed rows and others."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary_pos_emb(
    t: Tensor, freqs: Tensor, tensor_format: str, fused: bool, interleaved: bool = False, cu_seqlens: Tensor | None = None,
    cp_size: int = 1, cp_rank: int = 0,
) -> Tensor:  # fmt: skip
    """`t` [S, B, heads, d], or [T, heads, d] where `thd`; freqs [positions, 1, 1, d] fp32."""
    assert freqs.dtype == torch.float32
    assert (tensor_format == "thd") == (cu_seqlens is not None)
    if tensor_format == "thd":
        assert cp_size == 1
        lengths = cu_seqlens.diff().tolist()
        angles = torch.cat([freqs[:length] for length in lengths])[:, 0]
    else:
        angles = freqs[: t.shape[0]]
    first, second = t.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (t.float() * angles.cos() + turned * angles.sin()).to(t.dtype)
