"""Every metric key and its meaning. Keys are `group/name`; a record also has `update`, `step`, `phase` and `objective`.

"Mean" is over the trained tokens (loss_mask) of the update, all microbatches and ranks.
"""

from __future__ import annotations

METRICS: dict[str, str] = {
    # what is minimised
    "train/loss": "sum of loss_weights * per-token loss over the update",
    "train/grad_norm": "global L2 norm of the gradient before clipping",
    "train/lr": "learning rate of the update",
    "train/skipped_updates": "updates skipped so far: the gradient was not finite, or no token was trained",
    # the policy, teacher-forced on the trained tokens at temperature 1
    "policy/entropy": "mean entropy over the full vocabulary, in nats, during the update",
    "policy/old_entropy": "mean entropy of the policy at the start of the step, where the objective has an old policy",
    # what the objective reports; of the same keys for every objective
    "objective/nll": "mean negative log-likelihood",
    "objective/clip_fraction": "mean of 1[clipping made the loss of the token strictly larger]",
    "objective/ratio_mean": "mean of exp(clamp(logprobs - old_logprobs)); 1 where there is no old policy",
    "objective/ratio_max": "largest ratio; above 1 on the first update of a step it measures numerical noise",
    "objective/ratio_min": "smallest ratio",
    "objective/ppo_kl": "mean of old_logprobs - logprobs, clamped (the k1 estimate; may be negative)",
    "objective/kl": "mean KL divergence between policy and reference, in nats: exact or estimated, as the objective says",
    # of dft and iw_sft: the constant that a token's negative log-likelihood is multiplied with
    "objective/weight_mean": "mean weight",
    "objective/weight_max": "largest weight",
    "objective/weight_min": "smallest weight",
    "objective/weight_clip_fraction": "mean of 1[clipping changed the weight]",
    # of preferences, means over pairs; a reward is beta * (logprobs - ref_logprobs), summed over the response
    "rewards/chosen": "reward of the chosen side",
    "rewards/rejected": "reward of the rejected side",
    "rewards/margins": "reward of the chosen side less that of the rejected one",
    "rewards/accuracies": "1[the chosen side has the larger reward]",
    "logps/chosen": "log-probability of the chosen response, a sum over its tokens",
    "logps/rejected": "the same of the rejected response",
    # of experts, where model.moe_aux_loss_coeff is set
    "moe/aux_loss": "balance loss of the experts, its coefficient included, summed over layers",
    # of PPO's critic
    "critic/loss": "value loss",
    "critic/grad_norm": "global L2 norm of the critic's gradient before clipping",
    # how much went through
    "data/trained_tokens": "tokens with a loss",
    "data/real_tokens": "positions that are not padding",
    "data/samples": "samples",
    "perf/tokens_per_second": "real tokens a second over all ranks",
    "perf/seconds": "wall-clock seconds",
}
