"""Leave-one-out advantages: a reward against the mean of the other rollouts of its prompt."""

from __future__ import annotations

from typing import Literal

import numpy as np

from megapsft.advantages.group import members_of


def rloo_advantages(rewards: np.ndarray, groups: np.ndarray, singleton: Literal["raw", "zero"] = "raw") -> np.ndarray:
    """A_i = R_i - mean of the rewards of the *others* of the group, which is n / (n - 1) (R_i - mean).

    In a group whose rewards are all equal A = 0, exactly. A group of one has no others: A = R (`raw`), or 0 (`zero`).

    Args:
        rewards: [n].
        groups: [n], the number of the prompt of each; those of one group need not be neighbours.

    Returns:
        [n] fp64.

    Source: Back to Basics: Revisiting REINFORCE-Style Optimization (Ahmadian et al., ACL 2024), section 2.2, after Kool et al.
    (2019).

    Example:
        >>> rloo_advantages(np.array([1.0, 0.0, 1.0]), np.array([0, 0, 0]))
        array([ 0.5, -1. ,  0.5])
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    advantages = np.zeros_like(rewards)
    for members in members_of(groups):
        own = rewards[members]
        if len(own) == 1:
            advantages[members] = own if singleton == "raw" else 0.0
        elif np.ptp(own) > 0:
            advantages[members] = (own - own.mean()) * (len(own) / (len(own) - 1))
    return advantages
