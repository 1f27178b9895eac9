"""Group relative policy optimisation: PPO's clipped surrogate, with advantages from the other rollouts of the prompt."""

from __future__ import annotations

from dataclasses import dataclass

from megapsft.objectives._per_token import Aggregation
from megapsft.objectives._surrogate import Clipped, GroupRelative


@dataclass(frozen=True, kw_only=True)
class GRPO(Clipped, GroupRelative):
    """loss_t = max(-A r_t, -A clip(r_t, 1 - clip_low, 1 + clip_high)) + kl_coef k3_t, minimised, with

        r_t = exp(clamp(l_t - l_old_t, -20, 20))          [B, S], l_old is the policy at the start of the step
        A   = (R - mean) / (std + 1e-6)                   of the sample, over its group; std is unbiased

    Gradient: dloss_t/dl_t = -A r_t, and 0 where A > 0 and r_t > 1 + clip_high, where A < 0 and r_t < 1 - clip_low, and where
    |l_t - l_old_t| > 20; the KL adds kl_coef (1 - exp(l_ref_t - l_t)). With dual_clip = c the loss is -A c where A < 0 and
    r_t > c, and there has no gradient either; the papers have no such cap, verl always (3, or 10 in DAPO's scripts).

    The paper's aggregation, here the default, is a mean over samples of the mean over their tokens. Its KL has 0.04; here 0.

    Source: DeepSeekMath (Shao et al., 2024), Eq. 3 and 4 (printed as quantities to maximise); dual clip: Mastering Complex
    Control in MOBA Games with Deep RL (Ye et al., AAAI 2020), Eq. 4. TIS: `_surrogate.py`.

    Example:
        three tokens of one sample with A = 0.5

        logprobs     [-0.2,    -1.1,    -0.05]
        old_logprobs [-0.35,   -1.0,    -0.6]
        ratio        [ 1.1618,  0.9048,  1.7333]
        ->           [-0.5809, -0.4524, -0.6], their mean is -0.5444
        gradient     [-0.5809, -0.4524,  0], before the weights of 1/3
    """

    aggregation: Aggregation = "seq-mean-token-mean"
