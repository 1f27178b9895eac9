"""Cases of objectives over groups of rollouts and demonstrations: LUFFY, SRFT, and selection before SFT or DFT."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megapsft.advantages.registry import estimate
from megapsft.data.select import raft, rft
from megapsft.metrics.reduce import Reduction
from megapsft.objectives.srft import SRFT
from megapsft.types import Objective, PolicyOutput
from tests.oracles.batches import update_batch
from tests.oracles.per_token import build

LUFFY_METRICS = {
    "off_ratio_mean": "luffy/off_ratio_mean",
    "off_policy_prob": "luffy/off_policy_probability",
    "on_policy_prob": "luffy/on_policy_probability",
    "on_clipfrac": "luffy/on_clip_fraction",
    "ppo_kl": "objective/ppo_kl",
    "nll": "objective/nll",
}
SRFT_METRICS = {
    "sft_demo": "srft/sft_demonstration",
    "rl_demo": "srft/rl_demonstration",
    "rl_pos": "srft/rl_positive",
    "rl_neg": "srft/rl_negative",
    "w_sft_mean": "srft/weight_sft",
    "w_rl_mean": "srft/weight_rl",
    "w_rl_max": "srft/weight_rl_max",
    "off_policy_prob": "srft/off_policy_probability",
    "on_policy_prob": "srft/on_policy_probability",
    "nll": "objective/nll",
}


def evaluate_luffy(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Vectors without entropies have no entropy bonus."""
    result = at_update(build("luffy", {"entropy_coef": 0.0} | case["hparams"]), case["inputs"], dtype)
    return named(result, LUFFY_METRICS)


def evaluate_srft(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The weights of the vectors are by sequence, whatever the level; their mean of H counts a row without tokens as 0."""
    hparams = dict(case["hparams"])
    fixed = {"pi_beta": 1.0, "clip": False, "agg_sft": "token-mean over demo tokens"}
    for key, value in fixed.items():
        if hparams.pop(key, value) not in (value, None):
            raise ValueError(f"{key} can only be {value}")
    hparams["sft_coef"] = coefficient(hparams.pop("w_sft", "0.5*exp(-H)"), "-H")
    hparams["rl_coef"] = coefficient(hparams.pop("w_rl", "0.1*exp(H)"), "H")
    hparams["gamma"] = hparams.pop("demo_shaping_gamma", None) or 0.0
    hparams["agg"] = hparams.pop("agg_rl", "token-mean").removesuffix(" over all tokens")
    objective: SRFT = build("srft", {"entropy_coef": 0.0} | hparams)
    result = at_update(objective, case["inputs"], dtype)
    named(result, SRFT_METRICS)

    mask = torch.tensor(case["inputs"]["mask"], dtype=torch.bool)
    entropy = torch.tensor(case["inputs"]["entropy"], dtype=dtype)
    lengths = mask.sum(1).clamp(min=1)
    means = torch.where(mask, entropy, 0).sum(1) / lengths
    result["metrics"]["H_mean_over_sequences"] = result["metrics"]["srft/entropy"] * mask.any(1).sum().item() / len(mask)
    held = means.clamp(max=10)
    ones = torch.ones_like(held)
    result["w_sft_seq"] = (ones if objective.sft_coef is None else objective.sft_coef * (-held).exp()).tolist()
    result["w_rl_seq"] = (ones if objective.rl_coef is None else objective.rl_coef * held.exp()).tolist()
    return result


def coefficient(text: str | float | None, exponent: str) -> float | None:
    """c of "c*exp(exponent)"; None of a weight that is 1."""
    if text is None or text in (1, "1", "1.0"):
        return None
    found = re.fullmatch(rf"(?:([0-9.e-]+) *\* *)?exp\({exponent}\)", str(text).strip())
    if found is None:
        raise ValueError(f"{text} is not 1 or c*exp({exponent})")
    return float(found[1] or 1)


def evaluate_rft_raft(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """What selection keeps is all that is trained; nothing kept is a loss of 0."""
    hparams, inputs = dict(case["hparams"]), case["inputs"]
    mode, threshold = hparams.pop("mode"), hparams.pop("threshold", None)
    name = "dft" if hparams.pop("dft_weight", False) else "sft"
    groups = np.array(inputs["groups"])
    kept = np.zeros(len(groups), dtype=bool)
    for group in np.unique(groups):
        rewards = [inputs["rewards"][i] for i in np.flatnonzero(groups == group)]
        kept[groups == group] = raft(rewards) if mode == "raft" else rft(rewards, 1.0 if threshold is None else threshold)
    if mode not in ("rft", "raft"):
        raise ValueError(f"mode {mode} is not rft or raft")
    mask = (np.array(inputs["mask"], dtype=bool) & kept[:, None]).tolist()
    result = at_update(build(name, hparams), inputs | {"mask": mask}, dtype)
    result["kept"] = np.flatnonzero(kept).tolist()
    result["metrics"]["acceptance"] = float(kept.mean())
    return result


def at_update(objective: Objective, inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Loss, gradients, advantages and metrics of one update of one microbatch."""
    mask = torch.tensor(inputs["mask"], dtype=torch.bool)
    rewards = torch.tensor(inputs["rewards"], dtype=dtype)
    demonstration = torch.tensor(inputs.get("is_demo", [0] * len(mask)), dtype=torch.bool)
    if objective.advantages is None:
        advantages = torch.zeros_like(rewards)
    else:
        values = estimate(objective.advantages, np.array(inputs["rewards"], dtype=np.float64), np.array(inputs["groups"]))
        advantages = torch.as_tensor(np.asarray(values), dtype=dtype)

    def over_tokens(x: Tensor) -> Tensor:
        return x[:, None].expand(mask.shape)

    logprobs = torch.tensor(inputs["logprobs"], dtype=dtype, requires_grad=True)
    entropy = torch.tensor(inputs["entropy"], dtype=dtype) if "entropy" in inputs else torch.zeros_like(logprobs)
    entropy = entropy.detach().requires_grad_(objective.entropy_gradient)
    old_logprobs = torch.tensor(inputs["old_logprobs"], dtype=dtype) if "old_logprobs" in inputs else None
    batch = update_batch(
        objective, mask, dtype, demonstration=over_tokens(demonstration), rewards=over_tokens(rewards),
        advantages=over_tokens(advantages), old_logprobs=old_logprobs, entropy=entropy.detach(),
    )  # fmt: skip
    losses, metrics = objective(PolicyOutput(logprobs=logprobs, entropy=entropy), batch)
    loss = (batch.loss_weights * losses).sum()
    reduction = Reduction(objective.metrics)
    reduction.add(metrics, mask)
    result = {"loss": loss.item(), "advantages": advantages.tolist(), "metrics": reduction.finish()}
    loss.backward()
    result["grad_logprobs"] = logprobs.grad.tolist()
    if objective.entropy_gradient:
        result["grad_entropy"] = entropy.grad.tolist()
    return result


def named(result: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The result, with its metrics under the names of the vectors too."""
    result["metrics"] |= {theirs: result["metrics"][ours] for theirs, ours in names.items()}
    return result
