"""From per-token metrics of many microbatches on many ranks to one number each."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megapsft.metrics.quantile import NAN, bins, quantile
from megapsft.types import Metric, Over

QUANTILES: dict[Over, float] = {"p01": 0.01, "p50": 0.5, "p99": 0.99}


class Reduction:
    """The metrics of one update, accumulated without waiting for the device.

    With the weights w of a metric (its own, or the mask) over all microbatches and ranks: sum = sum of w x, mean = that over
    the sum of w, max and min over the tokens with w > 0, quantiles by weight. All in fp64; 0.0 where no token has w > 0, and
    values there may be anything.

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
        self._peaks = {key: zero - math.inf for key, kind in self.over.items() if kind in ("max", "min")}  # of -x where it is min
        self._bins = {key: zero.expand(NAN + 1) for key, kind in self.over.items() if kind in QUANTILES}

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
            elif metric.over in QUANTILES:
                self._bins[key] = self._bins[key] + bins(values, weights)
            else:
                peak = torch.where(there, values if metric.over == "max" else -values, -math.inf).amax()
                self._peaks[key] = torch.maximum(self._peaks[key], peak)

    def finish(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """One number a key, the same on all ranks of `group`; without a group, of this rank alone."""
        sums = _over_ranks([*self._sums.values(), *self._counts.values()], dist.ReduceOp.SUM, group).tolist()
        peaks = _over_ranks(list(self._peaks.values()), dist.ReduceOp.MAX, group).tolist()
        counts = _over_ranks(list(self._bins.values()), dist.ReduceOp.SUM, group)

        means = zip(self._sums, sums[: len(self._sums)], sums[len(self._sums) :], strict=True)
        result = {key: total / (count if self.over[key] == "mean" else 1) if count else 0.0 for key, total, count in means}
        for key, peak in zip(self._peaks, peaks, strict=True):
            result[key] = 0.0 if peak == -math.inf else peak if self.over[key] == "max" else -peak
        for key, of_key in zip(self._bins, counts.cpu(), strict=True):
            result[key] = quantile(of_key, QUANTILES[self.over[key]])
        return {key: result[key] for key in self.over}


def _over_ranks(parts: list[Tensor], operation: dist.ReduceOp, group: dist.ProcessGroup | None) -> Tensor:
    """The parts one under the other, reduced in one collective."""
    packed = torch.stack(parts) if parts else torch.zeros(0)
    if group is not None and parts:
        dist.all_reduce(packed, operation, group=group)
    return packed
