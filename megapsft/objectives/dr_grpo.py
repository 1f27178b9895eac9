"""Dr. GRPO: group relative policy optimisation without the biases of its two normalisations."""

from __future__ import annotations

from dataclasses import dataclass

from megapsft.objectives._per_token import Aggregation
from megapsft.objectives._surrogate import Clipped, GroupRelative


@dataclass(frozen=True, kw_only=True)
class DrGRPO(Clipped, GroupRelative):
    """loss_t = max(-A r_t, -A clip(r_t, 1 - clip_low, 1 + clip_high)), minimised: GRPO (see there) with

        A = R - mean                           of the group; no standard deviation, which favours easy and hard prompts
        L = sum of loss_t / (B L_max)          no division by the length, which favours short right and long wrong answers

    L_max is `max_response_length`, a constant that has to be given: the limit of the rollout engine. B counts the samples of the
    update, empty ones too. verl divides by L_max alone (aggregation = sum-over-Lmax), a loss B times as large.

    Gradient: dloss_t/dl_t = -A r_t, and 0 where A > 0 and r_t > 1 + clip_high, or A < 0 and r_t < 1 - clip_low.

    Source: Understanding R1-Zero-Like Training (Liu et al., 2025), section 3.2; the divisor of TRL.

    Example:
        three tokens of the only sample, with A = 0.5 and max_response_length = 8

        logprobs     [-0.2,    -1.1,    -0.05]
        old_logprobs [-0.35,   -1.0,    -0.6]
        ratio        [ 1.1618,  0.9048,  1.7333]
        ->           [-0.5809, -0.4524, -0.6], their sum over 8 is -0.2042
        gradient     [-0.5809, -0.4524,  0], before the weights of 1/8
    """

    aggregation: Aggregation = "sum-over-B-Lmax"
    norm_by_std: bool = False  # whether the advantage is divided by the standard deviation of the group
