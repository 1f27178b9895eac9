"""The estimator that an objective asks for, where rewards alone suffice."""

from __future__ import annotations

import numpy as np

from megapsft.advantages.group import group_advantages
from megapsft.advantages.rloo import rloo_advantages
from megapsft.types import AdvantageOptions


def estimate(options: AdvantageOptions, rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Advantages [n] fp64 of samples with rewards [n] in groups [n].

    Raises:
        ValueError: gae, which wants the values of every token as well: `megapsft.advantages.gae`.
    """
    match options.estimator:
        case "group":
            return group_advantages(rewards, groups, norm_by_std=options.norm_by_std, singleton=options.singleton)
        case "rloo":
            return rloo_advantages(rewards, groups, singleton=options.singleton)
    raise ValueError(f"estimator={options.estimator!r} needs more than rewards")
