"""DAPO: group relative policy optimisation with a higher upper clip and a mean over all tokens."""

from __future__ import annotations

from dataclasses import dataclass

from megapsft.objectives._surrogate import Clipped, GroupRelative


@dataclass(frozen=True, kw_only=True)
class DAPO(Clipped, GroupRelative):
    """loss_t = max(-A r_t, -A clip(r_t, 1 - clip_low, 1 + clip_high)), minimised: GRPO (see there) with

        clip_high = 0.28 over clip_low = 0.2    room for unlikely tokens to rise
        aggregation = token-mean                long samples weigh as much as they are long

    The other two of the paper's four techniques act before the objective: `megapsft.rewards.overlong` on the reward, and
    `megapsft.rollout.dynamic_sampling` on the groups. A group of equal rewards that stays has A = 0 and no gradient, but its
    tokens count in the mean.

    Gradient: dloss_t/dl_t = -A r_t, and 0 where A > 0 and r_t > 1 + clip_high, or A < 0 and r_t < 1 - clip_low.

    Source: DAPO (Yu et al., 2025), Eq. 8 to 12 (to maximise); no KL. Its scripts have dual_clip = 10, which the paper does not
    mention; here null. PSFT (Zhu et al., ICLR 2026), Table 12, uses the same numbers.

    Example:
        three tokens of one sample with A = -0.5

        logprobs     [-0.2,    -1.1,    -0.9]
        old_logprobs [-0.35,   -1.0,    -0.6]
        ratio        [ 1.1618,  0.9048,  0.7408]
        ->           [ 0.5809,  0.4524,  0.4], their mean is 0.4778
        gradient     [ 0.5809,  0.4524,  0], before the weights of 1/3
    """

    clip_high: float | None = 0.28  # the ratio is clipped from above at 1 + clip_high; None: it is not
