"""Cases of objectives over single tokens: loss, gradient and metrics at given log-probabilities."""

from __future__ import annotations

import math
from typing import Any

import torch

from megapsft.metrics.reduce import Reduction
from megapsft.objectives._per_token import PerToken
from megapsft.objectives.registry import build_objective
from megapsft.types import Metric, PolicyOutput
from tests.oracles.batches import update_batch
from tests.oracles.schedule import evaluate_schedule

OPTIONS = {"agg": "aggregation", "L_max": "max_response_length"}  # hparams that have other names here


def evaluate_sft(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return evaluate(build("sft", case["hparams"]), case, dtype)


def evaluate_psft(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A case with `theta0` trains a softmax from there; the others are one loss."""
    hparams = dict(case["hparams"])
    hparams.pop("clip_low", None)  # of the reference scripts; it never binds, and is no option here
    if "theta0" in case["inputs"]:
        schedule = {key: hparams.pop(key) for key in ("train_batch", "mini_batch", "lr", "optimizer", "steps")}
        return evaluate_schedule(build("psft", hparams), case["inputs"], dtype, **schedule)
    if not hparams.pop("clip", True):
        hparams["clip_high"] = None
    return evaluate(build("psft", hparams), case, dtype)


def build(name: str, hparams: dict[str, Any]) -> PerToken:
    """The objective of these hparams; one that it does not know is refused."""
    options = {OPTIONS.get(key, key): value for key, value in hparams.items()}
    if not options.get("aggregation", "").endswith("Lmax"):
        options.pop("max_response_length", None)
    return build_objective({"name": name} | options)


def evaluate(objective: PerToken, case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Loss, gradient and metrics of one update of one microbatch, under the names of the vectors."""
    given = {key: torch.tensor(value, dtype=dtype) for key, value in case["inputs"].items() if key != "mask"}
    mask = torch.tensor(case["inputs"]["mask"], dtype=torch.bool)
    logprobs, entropy = given["logprobs"].requires_grad_(), given["entropy"]
    batch = update_batch(objective, mask, dtype, old_logprobs=given.get("old_logprobs"), old_entropy=entropy)

    losses, metrics = objective(PolicyOutput(logprobs=logprobs, entropy=entropy), batch)
    loss = (batch.loss_weights * losses).sum()
    (gradient,) = torch.autograd.grad(loss, logprobs)

    reduction = Reduction(objective.metrics | {"policy/entropy": "mean", "below_low": "mean"})
    below_low = metrics["objective/ratio_min"].values < 1 - case["hparams"].get("clip_low", 1.0)
    reduction.add(dict(metrics) | {"policy/entropy": Metric(entropy), "below_low": Metric(below_low)}, mask)
    reduced = reduction.finish()
    return {
        "loss": loss.item(),
        "grad_logprobs": gradient.tolist(),
        "metrics": {
            "n_tokens": mask.sum().item(),
            "entropy": reduced["policy/entropy"],
            "nll": reduced["objective/nll"],
            "ppl": math.exp(reduced["objective/nll"]),
            "grad_l2": gradient.norm().item(),
            "ppo_kl": reduced["objective/ppo_kl"],
            "ratio_mean": reduced["objective/ratio_mean"],
            "ratio_max": reduced["objective/ratio_max"],
            "ratio_min": reduced["objective/ratio_min"],
            "pg_clipfrac": reduced["objective/clip_fraction"],
            "frac_below_low": reduced["below_low"],
            "clipped_positions": ((metrics["objective/clip_fraction"].values > 0) & mask).nonzero().tolist(),
        },
    }
