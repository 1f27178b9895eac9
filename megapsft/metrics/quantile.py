"""Quantiles over all ranks without gathering values: counts in fixed bins, which add up."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FINEST = 1e-4  # below, bins are evenly wide; above, in proportion to the value
LIMIT = 20.0  # values beyond count as this
HALF = 512  # bins to either side of that of 0
WIDTH = math.asinh(LIMIT / FINEST) / HALF
NAN = 2 * HALF + 1  # the last bin


def bins(values: Tensor, weights: Tensor) -> Tensor:
    """[1026] fp64: how much weight lies in each bin; the last has what is not a number.

    A value is known from its bin to 1.3 % of itself, or to 1.3e-6 where that is more; 0 exactly. Nothing waits for the device.

    Args:
        values: of any shape; where the weight is 0 they may be anything.
        weights: of the same shape.
    """
    there = weights > 0
    wanted = torch.where(there, values, 0.0).double()
    index = (torch.asinh(wanted.clamp(-LIMIT, LIMIT) / FINEST) / WIDTH).round() + HALF
    index = torch.where(wanted.isnan(), NAN, index).long()
    counts = torch.zeros(NAN + 1, dtype=torch.float64, device=values.device)
    return counts.index_add_(0, index.flatten(), torch.where(there, weights, 0.0).double().flatten())


def quantile(counts: Tensor, part: float) -> float:
    """The middle of the first bin up to which that part of the weight lies; nan where any value is, 0.0 without weight."""
    if counts[NAN] > 0:
        return math.nan
    total = counts.sum()
    if total == 0:
        return 0.0
    place = int(torch.searchsorted(counts[:NAN].cumsum(0), part * total * (1 - 1e-12)))
    return FINEST * math.sinh((place - HALF) * WIDTH)


__all__ = ["bins", "quantile"]
