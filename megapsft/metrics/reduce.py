"""From per-token metrics of many microbatches on many ranks to one number each."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megapsft.types import Metric, Over


class Reduction:
    """The metrics of one update, accumulated without waiting for the device.

    With the weights w of a metric (its own, or the mask) over all microbatches and ranks: sum = sum of w x, mean = that over
    the sum of w, max and min over the tokens with w > 0. All in fp64; 0.0 where no token has w > 0, and values there may be
    anything.

    Args:
        over: every key and its reduction. It must be the same on all ranks, and complete on those that will `add` nothing
            (pipeline stages without a head): its sorted order is the layout of the collectives.
        device: where the accumulators live.

    Example:
        >>> reduction = Reduction({"objective/nll": "mean"})
        >>> reduction.add({"objective/nll": Metric(torch.tensor([[0.2, 1.1, 9.0]]))}, torch.tensor([[True, True, False]]))
        >>> reduction.finish()
        {'objective/nll': 0.65}
    """

    def __init__(self, over: Mapping[str, Over], device: torch.device | str = "cpu"):
        self.over = dict(sorted(over.items()))
        zero = torch.zeros((), dtype=torch.float64, device=device)
        self._sums = {key: zero for key, kind in self.over.items() if kind in ("mean", "sum")}
        self._counts = {key: zero for key in self._sums}
        self._peaks = {key: zero - math.inf for key, kind in self.over.items() if key not in self._sums}  # of -x where it is min

    def add(self, metrics: Mapping[str, Metric], mask: Tensor) -> None:
        """Take in the metrics of one microbatch.

        Args:
            metrics: of keys in `over` and with the same reductions; values [B, S].
            mask: [B, S] bool; the weights of metrics that bring none.
        """
        for key, metric in metrics.items():
            if self.over.get(key) != metric.over:
                raise ValueError(f"{key} is reduced over {metric.over!r}, announced was {self.over.get(key)!r}")
            values = metric.values.detach().double()
            weights = mask.double() if metric.weights is None else metric.weights.detach().double()
            there = weights > 0
            if metric.over in ("mean", "sum"):
                self._sums[key] = self._sums[key] + torch.where(there, weights * values, 0.0).sum()
                self._counts[key] = self._counts[key] + weights.sum()
            else:
                peak = torch.where(there, values if metric.over == "max" else -values, -math.inf).amax()
                self._peaks[key] = torch.maximum(self._peaks[key], peak)

    def finish(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """One number a key, the same on all ranks of `group`; without a group, of this rank alone."""
        totals, peaks = list(self._sums.values()) + list(self._counts.values()), list(self._peaks.values())
        reduced = []
        for parts, operation in ((totals, dist.ReduceOp.SUM), (peaks, dist.ReduceOp.MAX)):
            packed = torch.stack(parts) if parts else torch.zeros(0)
            if group is not None and parts:
                dist.all_reduce(packed, operation, group=group)
            reduced.append(packed.tolist())
        totals, peaks = reduced

        means = zip(self._sums, totals[: len(self._sums)], totals[len(self._sums) :], strict=True)
        result = {key: total / (count if self.over[key] == "mean" else 1) if count else 0.0 for key, total, count in means}
        for key, peak in zip(self._peaks, peaks, strict=True):
            result[key] = 0.0 if peak == -math.inf else peak if self.over[key] == "max" else -peak
        return {key: result[key] for key in self.over}
