"""Generalised advantage estimation: token rewards and a value function to advantages and returns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

VARIANCE_EPS = 1e-8  # verl's


def gae(
    rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, gamma: float = 1.0, lam: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Over the n trained tokens of one sequence, from the last to the first, with V = A = 0 behind the last:

        delta_t = R_t + gamma V_{t+1} - V_t
        A_t     = delta_t + gamma lam A_{t+1}
        returns = A_t + V_t

    Tokens that are not trained (the answers of a tool) are skipped: t + 1 is the next trained token, and nothing is discounted
    on the way to it.

    Args:
        rewards: [S]; an outcome stands on the last trained token.
        values: [S], before the update; where masked, neither is read.
        mask: [S] bool.

    Returns:
        (advantages, returns), [S] fp64 each, 0 where masked.

    Source: High-Dimensional Continuous Control Using Generalized Advantage Estimation (Schulman et al., ICLR 2016), Eq. 16.

    Example:
        >>> gae(np.array([0.0, 9.0, 1.0]), np.array([0.5, 9.0, 0.25]), np.array([True, False, True]), lam=0.5)
        (array([0.125, 0.   , 0.75 ]), array([0.625, 0.   , 1.   ]))
    """
    mask = np.asarray(mask, dtype=bool)
    advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    next_value = next_advantage = 0.0
    for t in np.flatnonzero(mask)[::-1]:
        delta = rewards[t] + gamma * next_value - values[t]
        next_advantage = advantages[t] = delta + gamma * lam * next_advantage
        next_value = values[t]
        returns[t] = advantages[t] + values[t]
    return advantages, returns


def whiten(advantages: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """(A - mean) / sqrt(var + 1e-8) over all trained tokens of all sequences; var is unbiased.

    Args:
        advantages: [S] each, of any lengths.
        masks: [S] bool each.

    Returns:
        [S] fp64 each, 0 where masked; 0 everywhere if there are fewer than two tokens, which have no variance.

    Source: the 37 Implementation Details of PPO (Huang et al., ICLR 2022 blog track), detail 7; eps and variance as in verl.

    Example:
        >>> whiten([np.array([1.0, 9.0]), np.array([-1.0])], [np.array([True, False]), np.array([True])])
        [array([0.70710678, 0.        ]), array([-0.70710678])]
    """
    masks = [np.asarray(mask, dtype=bool) for mask in masks]
    trained = np.concatenate([np.asarray(a, dtype=np.float64)[mask] for a, mask in zip(advantages, masks, strict=True)] or [[]])
    whitened = [np.zeros(mask.shape) for mask in masks]
    if len(trained) < 2:
        return whitened
    mean, scale = trained.mean(), np.sqrt(trained.var(ddof=1) + VARIANCE_EPS)
    for result, advantage, mask in zip(whitened, advantages, masks, strict=True):
        result[mask] = (advantage[mask] - mean) / scale
    return whitened
