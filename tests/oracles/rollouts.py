"""Cases of the objectives on rollouts: rewards to advantages, and from there loss, gradient and metrics."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from megapsft.advantages.gae import gae, whiten
from megapsft.advantages.group import group_advantages
from megapsft.advantages.rloo import rloo_advantages
from megapsft.errors import Refused
from megapsft.metrics.reduce import Reduction
from megapsft.objectives._surrogate import Surrogate
from megapsft.objectives.ppo import PPO
from megapsft.rewards.overlong import overlong_penalty
from megapsft.rollout.dynamic_sampling import informative
from megapsft.types import Metric, Microbatch, Over, PolicyOutput
from tests.oracles.batches import update_batch
from tests.oracles.per_token import build

OPTIONS = {"dual_clip_c": "dual_clip", "C": "tis_cap", "level": "tis", "batch_normalize": "tis_batch_normalize"}
ONLY = {  # hparams that say what is so here in any case; gspo's aggregation is one of them
    "std": "unbiased",
    "kl": "k3",
    "vf_coef": 1.0,
    "rule": "std>0 or singleton",
}
WHITEN = {"masked, unbiased, eps 1e-8": True, "none": False, None: False}
METRICS = {
    "pg_clipfrac": "objective/clip_fraction",
    "clipfrac": "objective/clip_fraction",
    "pg_clipfrac_lower": "objective/clip_fraction_lower",
    "ppo_kl": "objective/ppo_kl",
    "ratio_mean": "objective/ratio_mean",
    "ratio_max": "objective/ratio_max",
    "ratio_min": "objective/ratio_min",
    "kl": "objective/kl",
    "nll": "objective/nll",
    "tis_mean": "tis/weight_mean",
    "tis_max": "tis/weight_max",
    "tis_clipfrac": "tis/clip_fraction",
    "mismatch_kl": "tis/mismatch_kl",
    "mismatch_k3": "tis/mismatch_k3",
    "vf_clipfrac": "critic/clip_fraction",
} | {f"{group}_{over}": f"{group}/{over}" for group in ("advantages", "reward") for over in ("mean", "max", "min")}


def evaluate_grpo(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return evaluate("grpo", case, dtype)


def evaluate_dr_grpo(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return evaluate("dr_grpo", case, dtype)


def evaluate_cispo(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return evaluate("cispo", case, dtype)


def evaluate_gspo(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    hparams = dict(case["hparams"])
    check(hparams.pop("agg", "seq-mean-token-mean"), "seq-mean-token-mean", "agg")
    return evaluate("gspo", case | {"hparams": hparams}, dtype)


def evaluate_tis(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Importance sampling under the surrogate of DAPO."""
    return evaluate("dapo", case, dtype)


def evaluate_dapo(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A case with `lengths` shapes rewards, one with `group_metric` chooses groups; the others are one loss."""
    if "lengths" in case["inputs"]:
        return shaped(case["inputs"], **case["hparams"])
    if "group_metric" in case["inputs"]:
        hparams = without_constants(case["hparams"])
        hparams.pop("metric", None)  # the name of what is given
        return sampled(case["inputs"], **hparams)
    return evaluate("dapo", case, dtype)


def shaped(
    inputs: dict[str, Any], *, max_response_length: int, overlong_buffer_len: int, penalty_factor: float = 1.0
) -> dict[str, Any]:
    lengths = inputs["lengths"]
    penalties = [overlong_penalty(n, max_response_length, overlong_buffer_len, penalty_factor) for n in lengths]
    rewards = [reward + penalty for reward, penalty in zip(inputs["base_rewards"], penalties, strict=True)]
    return {"penalty": penalties, "reward": rewards}


def sampled(inputs: dict[str, Any], *, train_prompts: int) -> dict[str, Any]:
    metric = inputs["group_metric"]
    return {"kept_groups": informative(metric), "used_groups": informative(metric, train_prompts)}


def evaluate(name: str, case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Loss, gradient and metrics of one update, whose advantages come from rewards and groups."""
    hparams = without_constants(case["hparams"])
    eps = hparams.pop("std_eps", 1e-6)
    objective = build_surrogate(name, hparams)
    given, mask = tensors(case["inputs"], dtype)
    rewards, groups = np.array(case["inputs"]["rewards"], dtype=np.float64), np.array(case["inputs"]["groups"])
    options = objective.advantages
    if options.estimator == "group":
        advantages = group_advantages(rewards, groups, options.norm_by_std, eps, options.singleton)
    else:
        advantages = rloo_advantages(rewards, groups, options.singleton)

    def at_tokens(of_samples: np.ndarray) -> Tensor:
        return torch.tensor(of_samples, dtype=dtype)[:, None].expand(mask.shape)

    logprobs = given.pop("logprobs")
    given |= {"advantages": at_tokens(advantages), "rewards": at_tokens(rewards)}
    batch = update_batch(objective, mask, dtype, **given)
    result, metrics = one_update(objective, logprobs, batch)
    result["advantages"] = advantages.tolist()
    if objective.tis != "off":
        result["is_weights"] = torch.where(mask, metrics["tis/weight_mean"].values, 0).tolist()
        if dtype == torch.float32 and "mismatch_k3" in case["outputs"].get("metrics", {}):  # overflows it: held to fp64 alone
            result["metrics"]["mismatch_k3"] = evaluate(name, case, torch.float64)["metrics"]["mismatch_k3"]
    if name == "gspo":
        result["seq_ratio"] = metrics["objective/sequence_ratio_max"].values[:, 0].tolist()
    return result


def evaluate_ppo(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Token rewards and values to advantages, and from there both losses."""
    hparams = without_constants(case["hparams"])
    hparams["clip_low"] = hparams["clip_high"] = hparams.pop("clip")
    if "whiten" in hparams:
        hparams["whiten"] = WHITEN.get(hparams["whiten"], hparams["whiten"])
    objective: PPO = build_surrogate("ppo", hparams)
    given, mask = tensors(case["inputs"], dtype)
    rows = [np.array(case["inputs"][key], dtype=np.float64) for key in ("token_rewards", "values")]
    trained = list(mask.numpy())
    pairs = [gae(r, v, m, objective.gamma, objective.lam) for r, v, m in zip(*rows, trained, strict=True)]
    raw, returns = ([pair[index] for pair in pairs] for index in (0, 1))
    advantages = whiten(raw, trained) if objective.whiten else raw

    def tensor(arrays: list[np.ndarray]) -> Tensor:
        return torch.tensor(np.stack(arrays), dtype=dtype)

    vpreds = given["vpreds"].requires_grad_()
    fields = {"old_logprobs": given["old_logprobs"], "values": given["values"]}
    batch = update_batch(objective, mask, dtype, advantages=tensor(advantages), returns=tensor(returns), **fields)
    result, _ = one_update(objective, given["logprobs"], batch)
    losses, metrics = objective.value_loss(vpreds, batch)
    loss = (batch.loss_weights * losses).sum()
    (gradient,) = torch.autograd.grad(loss, vpreds)
    result["metrics"] |= named(reduced(objective.value_metrics, metrics, mask))
    return result | {
        "advantages_raw": [row.tolist() for row in raw],
        "advantages": [row.tolist() for row in advantages],
        "returns": [row.tolist() for row in returns],
        "vf_loss": loss.item(),
        "grad_vpreds": gradient.tolist(),
    }


def one_update(objective: Surrogate, logprobs: Tensor, batch: Microbatch) -> tuple[dict[str, Any], dict[str, Metric]]:
    """(loss, gradient and metrics under the names of the vectors, the metrics of the tokens)."""
    logprobs = logprobs.requires_grad_()
    losses, metrics = objective(PolicyOutput(logprobs=logprobs, entropy=torch.zeros_like(logprobs)), batch)
    loss = (batch.loss_weights * losses).sum()
    (gradient,) = torch.autograd.grad(loss, logprobs)
    numbers = named(reduced(objective.metrics, metrics, batch.loss_mask))
    numbers |= {"n_tokens": batch.loss_mask.sum().item(), "grad_l2": gradient.norm().item()}
    numbers.setdefault("pg_clipfrac_lower", 0.0)  # without a dual clip
    return {"loss": loss.item(), "grad_logprobs": gradient.tolist(), "metrics": numbers}, dict(metrics)


def build_surrogate(name: str, hparams: dict[str, Any]) -> Surrogate:
    """The objective of these hparams; one that it does not know is refused."""
    hparams = {OPTIONS.get(key, key): value for key, value in hparams.items()}
    if not hparams.pop("clip", True):
        hparams |= {"clip_low": None, "clip_high": None}
        hparams.pop("dual_clip", None)
    return build(name, hparams)


def without_constants(hparams: dict[str, Any]) -> dict[str, Any]:
    """What is left of the hparams when those are gone that must have one value."""
    for key in hparams.keys() & ONLY.keys():
        check(hparams[key], ONLY[key], key)
    return {key: value for key, value in hparams.items() if key not in ONLY}


def check(value: Any, only: Any, key: str) -> None:
    if value != only:
        raise Refused(f"{key}={value!r}", "is not known here", f"use {only!r}")


def tensors(inputs: dict[str, Any], dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """What is given for every token, and the mask."""
    per_sample = {"rewards", "groups", "mask"}
    given = {key: torch.tensor(value, dtype=dtype) for key, value in inputs.items() if key not in per_sample}
    return given, torch.tensor(inputs["mask"]) > 0


def reduced(over: dict[str, Over], metrics: dict[str, Metric], mask: Tensor) -> dict[str, float]:
    reduction = Reduction(over)
    reduction.add(metrics, mask)
    return reduction.finish()


def named(numbers: dict[str, float]) -> dict[str, float]:
    """Under the names of the vectors."""
    return {theirs: numbers[ours] for theirs, ours in METRICS.items() if ours in numbers}
