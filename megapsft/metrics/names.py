"""Every metric key and its meaning. Keys are `group/name`; a record also has `update`, `step`, `phase` and `objective`.

"Mean" is over the trained tokens (loss_mask) of the update, all microbatches and ranks.
"""

from __future__ import annotations

METRICS: dict[str, str] = {
    # what is minimised
    "train/loss": "sum of loss_weights * per-token loss over the update",
    "train/grad_norm": "global L2 norm of the gradient before clipping",
    "train/lr": "learning rate of the update; 0 where the critic alone is trained",
    "train/skipped_updates": "updates skipped so far: the gradient was not finite, or no token was trained",
    # the policy, teacher-forced on the trained tokens at temperature 1
    "policy/entropy": "mean entropy over the full vocabulary, in nats, during the update",
    "policy/old_entropy": "mean entropy of the policy at the start of the step, where the objective has an old policy",
    # what the objective reports; of the same keys for every objective
    "objective/nll": "mean negative log-likelihood",
    "objective/clip_fraction": "mean of 1[clipping made the token's loss strictly larger], of cispo 1[the ratio was clipped]",
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
    # of rollouts
    "objective/clip_fraction_lower": "mean of 1[advantage below 0 and ratio above dual_clip]",
    "objective/sequence_ratio_mean": "of gspo: mean over samples of exp(mean of logprobs - old_logprobs over the sample)",
    "objective/sequence_ratio_max": "largest ratio of a sample",
    "objective/sequence_ratio_min": "smallest ratio of a sample",
    "advantages/mean": "mean advantage",
    "advantages/max": "largest advantage",
    "advantages/min": "smallest advantage",
    "reward/mean": "mean reward over samples",
    "reward/max": "largest reward",
    "reward/min": "smallest reward",
    # of truncated importance sampling; d is old_logprobs - rollout_logprobs, 0 where both engines compute the same
    "tis/weight_mean": "mean weight",
    "tis/weight_max": "largest weight",
    "tis/clip_fraction": "mean of 1[the weight was cut to tis_cap]",
    "tis/mismatch_kl": "mean of rollout_logprobs - old_logprobs (the k1 estimate of the mismatch; may be negative)",
    "tis/mismatch_k3": "mean of exp(d) - d - 1 with d = old_logprobs - rollout_logprobs (the k3 estimate)",
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
    "critic/clip_fraction": "mean of 1[clipping made the value loss of the token strictly larger]",
    "critic/return_mean": "mean return",
    "critic/return_square": "mean squared return",
    "critic/error_mean": "mean of returns - values, the values being those at the start of the step",
    "critic/error_square": "mean of its square",
    "critic/explained_variance": "1 - var(returns - values) / (var(returns) + 1e-5)",
    # demonstrations and rollouts in one update
    "luffy/off_ratio_mean": "mean of f(p) over demonstration tokens",
    "luffy/off_policy_probability": "mean probability of demonstration tokens",
    "luffy/on_policy_probability": "mean probability of rollout tokens under the old policy",
    "luffy/on_clip_fraction": "of rollout tokens: mean of 1[clipping made the loss strictly larger]",
    "srft/sft_demonstration": "part of the loss: demonstrations, supervised",
    "srft/rl_demonstration": "part of the loss: demonstrations, by their advantage",
    "srft/rl_positive": "part of the loss: rollouts with a reward above 0",
    "srft/rl_negative": "part of the loss: the other rollouts",
    "srft/entropy": "mean entropy, in nats, over the tokens of a sample, and then over samples",
    "srft/weight_sft": "mean of w_SFT over demonstration tokens",
    "srft/weight_rl": "mean of w_RL over tokens of rollouts with a reward above 0",
    "srft/weight_rl_max": "largest w_RL of these",
    "srft/off_policy_probability": "mean probability of demonstration tokens",
    "srft/on_policy_probability": "mean probability of rollout tokens",
    "hpt/sft": "part of the loss: demonstrations",
    "hpt/rl": "part of the loss: rollouts",
    "hpt/demonstration_tokens": "share of the trained tokens that are of demonstrations",
    "hpt/on_clip_fraction": "of rollout tokens: mean of 1[clipping made the loss strictly larger]",
    # of responses that are sampled while training, by step; reward/<label> is the mean of each reward before its weight
    "reward/timeouts": "responses whose verifier was late: their reward of this kind is 0",
    "reward/deaths": "responses whose verifier's process ended: a crash, or its memory",
    "reward/errors": "responses whose verifier raised",
    "rollout/groups": "groups of responses that are trained",
    "rollout/equal_groups": "share of them whose rewards are all equal",
    "rollout/discarded_groups": "groups that dynamic sampling left out",
    "rollout/held_demonstrations": "demonstrations that wait in rollout.demonstration_buffer",
    "rollout/length": "mean length of a response, in tokens",
    "rollout/length_max": "longest response",
    "rollout/unfinished": "share of responses that were cut at rollout.max_tokens",
    "rollout/nll": "mean of -rollout_logprobs over the tokens of responses",
    "rollout/weight_lag": "mean over responses of the steps that the oldest weights they were sampled with are behind",
    "rollout/weight_lag_max": "largest of them",
    "rollout/aborted": "responses that were on their way when the step had enough: they wait for the next one",
    "rollout/restarted": "responses of earlier steps that were too old to be gone on with",
    "rollout/tokens_per_second": "tokens of responses a second, while they are sampled and scored",
    # how far the engine that sampled is from the policy before the step; d is old_logprobs - rollout_logprobs
    "rollout/mismatch_kl": "mean of -d over the tokens of responses (the k1 estimate; may be negative)",
    "rollout/mismatch_k3": "mean of exp(d) - d - 1 (the k3 estimate)",
    "rollout/mismatch_max": "largest |d|",
    "perf/rollout_seconds": "that sampling and scoring the step took, whenever it was done",
    "perf/rollout_wait_seconds": "that training waited for them",
    "perf/weight_update_seconds": "that the engine took to get the weights of the policy",
    # how much went through
    "data/trained_tokens": "tokens with a loss",
    "data/real_tokens": "positions that are not padding",
    "data/samples": "samples",
    "perf/tokens_per_second": "real tokens a second over all ranks",
    "perf/seconds": "wall-clock seconds",
}
