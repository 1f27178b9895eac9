"""Which samples a step takes."""

from __future__ import annotations

import numpy as np

from megapsft.errors import Refused


class Sampler:
    """An endless stream of epochs, cut into batches that run across the borders of epochs.

    A pure function of (seed, step): a resumed run needs only its step, and any split of the run over ranks sees the same
    stream.

    Example:
        >>> Sampler(size=3, batch_size=2, seed=0, shuffle=False).indices(1)
        array([2, 0])
    """

    def __init__(self, size: int, batch_size: int, seed: int, shuffle: bool):
        """
        Raises:
            Refused: no samples, no batch, or a negative seed.
        """
        if size < 1:
            raise Refused(f"{size} samples", "cannot fill a batch", "name data with at least one row")
        if batch_size < 1:
            raise Refused(f"train.batch_size={batch_size}", "must be at least 1", "set train.batch_size=256")
        if seed < 0:
            raise Refused(f"train.seed={seed}", "must not be negative", "set train.seed=1234")
        self.size, self.batch_size, self.seed, self.shuffle = size, batch_size, seed, shuffle
        self._orders: dict[int, np.ndarray] = {}

    def indices(self, step: int) -> np.ndarray:
        """Samples of batch `step` (from 0): [batch_size] int64, each below `size`."""
        return self.draw(step * self.batch_size, self.batch_size)

    def draw(self, start: int, count: int) -> np.ndarray:
        """Samples `start`, ..., `start + count - 1` of the stream: [count] int64."""
        if count == 0:
            return np.zeros(0, np.int64)
        epochs, places = np.divmod(np.arange(start, start + count), self.size)
        needed = range(int(epochs[0]), int(epochs[-1]) + 1)
        orders = self._orders  # of some epochs: the next draw mostly needs the same; it may come from another thread
        if any(epoch not in orders for epoch in needed):
            near = {epoch: order for epoch, order in orders.items() if abs(epoch - needed.start) <= 1}
            orders = self._orders = near | {epoch: self._order(epoch) for epoch in needed if epoch not in near}
        return np.concatenate([orders[epoch][places[epochs == epoch]] for epoch in needed])

    def epoch(self, step: int) -> float:
        """Epochs done when batch `step` begins."""
        return step * self.batch_size / self.size

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.size)
        return np.random.default_rng([self.seed, epoch]).permutation(self.size)
