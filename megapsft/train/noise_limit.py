"""How much of what an objective clips may be noise: a function of the config and the objective, and of nothing else."""

from __future__ import annotations

from megapsft.config import Config
from megapsft.errors import Refused
from megapsft.train.phases import first_old_pass, has_old_policy
from megapsft.types import Objective

OF_FP8 = 1e-3
"""The share of ratios that noise alone may clip where layers compute in FP8 and nothing else is said.

It is about what learning itself clips: of GRPO a thousandth of all tokens. Source: Group Sequence Policy Optimization
(arXiv:2507.18071), Fig. 2. Above it most of what is clipped may be noise.
"""


def limit_of(config: Config, objective: Objective) -> float | None:
    """The share of ratios that noise alone may clip, or the run is refused; None: it is not measured.

    Without a clip range nothing is clipped; and where each step has one update without an old pass, every ratio is 1.
    """
    if not _clips(config, objective):
        return None
    asked = config.train.max_noise_clipped
    return OF_FP8 if asked is None and config.fp8.format is not None else asked


def check_limit(config: Config, objective: Objective) -> None:
    """Refuse a limit that has nothing to limit."""
    if config.train.max_noise_clipped is not None and not _clips(config, objective):
        name = config.objective["name"]
        rule = f"is of ratios that a clip range cuts, and objective.name={name} as configured has none that differ from 1"
        remedy = "leave it out, or choose an objective with a ratio, a clip range and several updates a step"
        raise Refused(f"train.max_noise_clipped={config.train.max_noise_clipped:g}", rule, remedy)


def _clips(config: Config, objective: Objective) -> bool:
    train = config.train
    updates = train.batch_size // (train.minibatch_size or train.batch_size)
    return has_old_policy(objective) and objective.clip_range != (None, None) and updates > first_old_pass(objective)


__all__ = ["OF_FP8", "check_limit", "limit_of"]
