"""Cases of the offline objectives: SFT with a KL, DFT, importance-weighted SFT, GEM and DPO.

Where a case gives logits, they go through the real head: as its hidden states, under an output layer that is the identity.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from megapsft.metrics.reduce import Reduction
from megapsft.objectives.dpo import DPO
from megapsft.objectives.registry import build_objective
from megapsft.objectives.sft_kl import SFTKL
from megapsft.policy.vocab_parallel import vocab_parallel_logprobs
from megapsft.types import Metric, Objective, PolicyOutput
from tests.oracles.batches import update_batch
from tests.oracles.per_token import build

KL = {"full_reverse": "reverse", "full_forward": "forward"}
LEVEL = {"geometric": "geometric_mean"}
NO_CLIP = (0.0, 1e9)  # beyond exp(20), the largest weight before the clip


def evaluate_sft_kl(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The vectors report the KL at kl_coef = 0 too, where ours asks for no reference: there it is that of kl_coef = 1."""
    hparams = dict(case["hparams"])
    kl = hparams.pop("kl", "reverse")
    hparams["kl"] = KL.get(kl, kl)
    objective: SFTKL = build("sft_kl", hparams)
    evaluate = at_logits if "logits" in case["inputs"] else at_logprobs
    result = evaluate(objective, case, dtype)
    if objective.kl_coef == 0:
        measured = evaluate(dataclasses.replace(objective, kl_coef=1.0), case, dtype)
        result["metrics"]["kl"] = measured["metrics"]["objective/kl"]
    else:
        result["metrics"]["kl"] = result["metrics"]["objective/kl"]
    return result


def evaluate_dft(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    level = case["hparams"].get("level", "token")
    result = at_logprobs(build("dft", case["hparams"] | {"level": LEVEL.get(level, level)}), case, dtype)
    names = {"weight_mean": "objective/weight_mean", "weight_min": "objective/weight_min", "original_loss": "objective/nll"}
    return renamed(result, names)


def evaluate_iw_sft(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """`temp` is inert at level token, as its formula has none."""
    hparams = dict(case["hparams"])
    if "clip" in hparams:
        clip = hparams.pop("clip") or NO_CLIP
        bounds = [free if bound is None else bound for bound, free in zip(clip, NO_CLIP, strict=True)]
        hparams["clip_low"], hparams["clip_high"] = bounds
    temperature = hparams.pop("temp", 1.0)
    if hparams.get("level") == "sequence":
        hparams["temperature"] = temperature
    result = at_logprobs(build("iw_sft", hparams), case, dtype)
    names = {f"iw_{over}": f"objective/weight_{over}" for over in ("mean", "max", "min")}
    return renamed(result, names | {"clipfrac": "objective/weight_clip_fraction"})


def evaluate_gem(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return at_logits(build("gem", case["hparams"]), case, dtype)


def evaluate_dpo(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Pairs as the data deals them out: chosen, rejected, chosen, ...

    A pair without any trained token has a reward of 0 on both sides and the constant loss log 2. The vectors count it, ours has
    no token to report it on (and where no pair has one, a loss of 0 on both accounts).
    """
    given = {key: torch.tensor(value, dtype=dtype) for key, value in case["inputs"].items() if not key.endswith("mask")}
    masks = [torch.tensor(case["inputs"][f"{side}_mask"]) > 0 for side in ("chosen", "rejected")]
    objective: DPO = build_objective({"name": "dpo"} | case["hparams"])
    mask = interleaved(*masks)
    logprobs = interleaved(given["chosen_logprobs"], given["rejected_logprobs"]).requires_grad_()
    ref_logprobs = interleaved(given["ref_chosen_logprobs"], given["ref_rejected_logprobs"])
    batch = update_batch(objective, mask, dtype, ref_logprobs=ref_logprobs)

    losses, metrics = objective(PolicyOutput(logprobs=logprobs, entropy=torch.zeros_like(logprobs)), batch)
    loss = (batch.loss_weights * losses).sum()
    (gradient,) = torch.autograd.grad(loss, logprobs)
    counted = (mask[0::2] | mask[1::2]).any(dim=1).double().mean().item()
    return {
        "loss": loss.item() + (math.log(2) * (1 - counted) if counted else 0.0),
        "grad_chosen": gradient[0::2, : masks[0].shape[1]].tolist(),
        "grad_rejected": gradient[1::2, : masks[1].shape[1]].tolist(),
        "metrics": {key.replace("/", "_"): counted * value for key, value in reduced(objective, metrics, mask).items()},
    }


def at_logprobs(objective: Objective, case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Loss, gradient and metrics of one update of one microbatch, whose log-probabilities are given."""
    inputs = dict(case["inputs"])
    mask = torch.tensor(inputs.pop("mask")) > 0
    given = {key: torch.tensor(value, dtype=dtype) for key, value in inputs.items()}
    logprobs = given.pop("logprobs").requires_grad_()
    entropy = given.pop("entropy", None)
    batch = update_batch(objective, mask, dtype, **given)
    output = PolicyOutput(logprobs=logprobs, entropy=torch.zeros_like(logprobs) if entropy is None else entropy)

    losses, metrics = objective(output, batch)
    loss = (batch.loss_weights * losses).sum()
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return {"loss": loss.item(), "grad_logprobs": gradient.tolist(), "metrics": summary(objective, metrics, mask, entropy)}


def at_logits(objective: Objective, case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same where logits are given: [T, V] with labels and mask [T], one sample; or [B, L, V], a sample a row."""
    inputs = dict(case["inputs"])
    mask = torch.atleast_2d(torch.tensor(inputs.pop("mask"))) > 0
    labels = torch.atleast_2d(torch.tensor(inputs.pop("labels")))
    logits = torch.tensor(inputs.pop("logits"), dtype=dtype).requires_grad_()
    vocab = logits.shape[-1]
    reference = {}
    if objective.term and objective.term.kind != "gem":
        ref_logits = torch.tensor(inputs["ref_logits"], dtype=dtype).flatten(0, -2)
        reference = {"ref_hidden": ref_logits, "ref_weight": torch.eye(vocab, dtype=dtype)}

    found = vocab_parallel_logprobs(
        logits.flatten(0, -2),
        torch.eye(vocab, dtype=dtype),
        torch.where(mask, labels, 0).flatten(),
        None,
        vocab,
        1 << 20,
        entropy_gradient=objective.entropy_gradient,
        term=objective.term,
        **reference,
    )
    logprobs, entropy, term = (x.view(mask.shape) for x in (*found, torch.zeros(mask.shape))[:3])
    output = PolicyOutput(logprobs=logprobs, entropy=entropy, term=term if objective.term else None)
    batch = update_batch(objective, mask, dtype)
    losses, metrics = objective(output, batch)
    loss = (batch.loss_weights * losses).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    return {"loss": loss.item(), "grad_logits": gradient.tolist(), "metrics": summary(objective, metrics, mask, entropy)}


def interleaved(chosen: Tensor, rejected: Tensor) -> Tensor:
    """[2 B, L]: the rows of both in turn, the shorter ones padded."""
    length = max(chosen.shape[1], rejected.shape[1])
    return torch.stack([pad(side, (0, length - side.shape[1])) for side in (chosen, rejected)], dim=1).flatten(0, 1)


def summary(objective: Objective, metrics: dict[str, Metric], mask: Tensor, entropy: Tensor | None) -> dict[str, float]:
    """The metrics of an update under their own names, and what the vectors of every objective may ask for."""
    result = reduced(objective, metrics, mask)
    result |= {"nll": result["objective/nll"], "ce": result["objective/nll"], "n_tokens": mask.sum().item()}
    if entropy is not None:
        reduction = Reduction({"policy/entropy": "mean"})
        reduction.add({"policy/entropy": Metric(entropy)}, mask)
        result["entropy"] = reduction.finish()["policy/entropy"]
    return result


def reduced(objective: Objective, metrics: dict[str, Metric], mask: Tensor) -> dict[str, float]:
    reduction = Reduction(objective.metrics)
    reduction.add(metrics, mask)
    return reduction.finish()


def renamed(result: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """With metrics under the names of the vectors as well: `names` of theirs to ours."""
    return result | {"metrics": result["metrics"] | {theirs: result["metrics"][ours] for theirs, ours in names.items()}}
