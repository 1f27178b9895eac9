"""Dynamic sampling: prompts whose rollouts are all alike teach nothing, and others are taken in their place."""

from __future__ import annotations

from collections.abc import Sequence


def informative(metric_by_group: Sequence[Sequence[float]], train_prompts: int | None = None) -> list[int]:
    """Indices of the groups whose metric is not the same for all members, or that have one member only; in order.

    The metric is the bare outcome (accuracy), not the reward: an all-correct group whose rewards differ by a length penalty
    alone is dropped. A dropped group differs from one that stays with advantages of 0 in that its tokens do not count in a mean.

    Args:
        metric_by_group: of each group the metric of each rollout.
        train_prompts: only the first so many; fewer where there are no more, and then more is to be sampled.

    Source: DAPO (Yu et al., 2025), Eq. 11 and Algorithm 1.

    Example:
        >>> informative([[1, 1], [1, 0], [0, 0], [0, 1]], train_prompts=1)
        [1]
    """
    kept = [index for index, metric in enumerate(metric_by_group) if len(metric) == 1 or len(set(metric)) > 1]
    return kept[:train_prompts]
