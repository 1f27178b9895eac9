"""The rotary frequencies of a model. Megatron knows one kind of scaling, and hard-codes its original context length of 8192."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megapsft.models.hf_config import HFConfig


def inverse_frequencies(hf: HFConfig) -> Tensor:
    """[head_dim / 2] fp32: by how many radians each pair of dimensions turns from one position to the next.

    default: theta^(-2i / head_dim). linear: these divided by `factor`. llama3: divided by `factor` where the wavelength is long
    against the original context, unchanged where it is short, and blended in between (Llama 3.1's `rope_scaling`).
    """
    rope = hf.rope
    exponents = torch.arange(0, hf.head_dim, 2, dtype=torch.float32) / hf.head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.type == "linear":
        return frequencies / rope.factor
    if rope.type == "llama3":
        turns = rope.original_max_position_embeddings / (2 * math.pi / frequencies)  # within the original context
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = keep.clamp(0.0, 1.0)  # 0: few turns, scaled; 1: many, kept
        return (1 - keep) * frequencies / rope.factor + keep * frequencies
    return frequencies
