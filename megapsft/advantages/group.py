"""Group-relative advantages: a reward against those of the other rollouts of its prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np


def group_advantages(
    rewards: np.ndarray,
    groups: np.ndarray,
    norm_by_std: bool = True,
    eps: float = 1e-6,
    singleton: Literal["raw", "zero"] = "raw",
) -> np.ndarray:
    """A_i = (R_i - mean) / (std + eps), or R_i - mean, over the group of i; std is unbiased.

    In a group whose rewards are all equal A = 0, exactly. A group of one has no spread: its mean counts as 0 and its std as 1
    (`raw`, as in verl, so that A = R / (1 + eps), or R without std), or its advantage is 0 (`zero`).

    Args:
        rewards: [n].
        groups: [n], the number of the prompt of each; those of one group need not be neighbours.

    Returns:
        [n] fp64.

    Source: DeepSeekMath (Shao et al., 2024), section 4.1.2; without std: Understanding R1-Zero-Like Training (Liu et al., 2025),
    Dr. GRPO. The papers print neither eps nor which std; both are verl's here (TRL's eps is 1e-4).

    Example:
        >>> group_advantages(np.array([1.0, 0.0, 1.0, 1.0]), np.array([0, 0, 0, 1]), norm_by_std=False)
        array([ 0.33333333, -0.66666667,  0.33333333,  1.        ])
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    advantages = np.zeros_like(rewards)
    for members in members_of(groups):
        own = rewards[members]
        if len(own) == 1:
            raw = own / (1 + eps) if norm_by_std else own
            advantages[members] = raw if singleton == "raw" else 0.0
        elif np.ptp(own) > 0:
            scale = own.std(ddof=1) + eps if norm_by_std else 1.0
            advantages[members] = (own - own.mean()) / scale
    return advantages


def members_of(groups: np.ndarray) -> Iterator[np.ndarray]:
    """The indices of the members of each group."""
    order = np.argsort(groups, kind="stable")
    _, starts = np.unique(np.asarray(groups)[order], return_index=True)
    yield from np.split(order, starts[1:]) if len(order) else ()
