"""Some samples of an update, token by token: what the policy thought of each trained token, and what the objective made of it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megapsft.types import Metric, Microbatch, PolicyOutput

COLUMNS = ("trained", "token_ids", "logprobs", "ratios", "clipped", "entropy", "loss_weights")


class TokenRows:
    """Of the first samples of an update, by their number in it: the same ones however it is packed and split.

    Args:
        most: samples of each update.
    """

    def __init__(self, most: int, device: torch.device | str = "cpu"):
        self.most, self.device = most, device
        self._found: list[tuple[Tensor, Tensor, Tensor]] = []  # of each microbatch: samples, positions, columns

    def add(self, output: PolicyOutput, microbatch: Microbatch, metrics: Mapping[str, Metric]) -> None:
        """Take in one microbatch; `metrics` are those that the objective made of it."""
        there = microbatch.loss_mask & (microbatch.sample_ids < self.most)
        columns = (
            microbatch.loss_mask,
            microbatch.labels,
            output.logprobs.detach(),
            metrics["objective/ratio_mean"].values,
            metrics["objective/clip_fraction"].values,
            output.entropy.detach(),
            microbatch.loss_weights,
        )
        values = torch.stack([column[there].double() for column in columns])
        self._found.append((microbatch.sample_ids[there], microbatch.position_ids[there], values))

    def take(self) -> dict[int, np.ndarray]:
        """Collective. Sample of the update -> [positions, COLUMNS] fp64, the same on every rank; 0 where nothing is trained.

        Position s is the one that predicts token s + 1 of the sequence.
        """
        ends = [int(positions.max()) + 1 for _, positions, _ in self._found if len(positions)]
        longest = torch.tensor(max(ends, default=0), device=self.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        table = torch.zeros(self.most, int(longest), len(COLUMNS), dtype=torch.float64, device=self.device)
        for samples, positions, values in self._found:
            table[samples, positions] = values.T
        dist.all_reduce(table)  # each token is on one rank of those that count
        self._found = []
        return {sample: rows for sample, rows in enumerate(table.cpu().numpy()) if rows[:, 0].any()}


def token_record(rows: np.ndarray) -> dict[str, list]:
    """One sample of `TokenRows.take` as lists of JSON values over its trained tokens, in order.

    `positions` count from the first trained token; numbers that are not finite become null, the others have the fewest digits
    that give the same fp32.
    """
    there = np.flatnonzero(rows[:, 0])
    columns = dict(zip(COLUMNS[1:], rows[there, 1:].T, strict=True))
    token_ids, clipped = columns.pop("token_ids").astype(int), columns.pop("clipped") > 0
    record: dict[str, list] = {"token_ids": token_ids.tolist(), "positions": (there - there[0]).tolist()}
    for name, values in columns.items():
        record[name] = [float(str(x)) if np.isfinite(x) else None for x in values.astype(np.float32)]
    return record | {"clipped": clipped.tolist()}


__all__ = ["COLUMNS", "TokenRows", "token_record"]
