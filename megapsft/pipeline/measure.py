"""What a stage made of the model: its answers to the benchmarks, its entropy, and how far it is from where it began."""

from __future__ import annotations

import gc
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megapsft.config import RolloutConfig
from megapsft.data.chat_template import ChatTemplate
from megapsft.data.pack import pack
from megapsft.data.plan import Layout
from megapsft.evaluate.engine import dtype_of, open_engine, weights_digest
from megapsft.evaluate.evaluation import Evaluated, evaluate
from megapsft.output.whole import write_whole
from megapsft.pipeline.config import START
from megapsft.pipeline.plan import PipelinePlan
from megapsft.policy.build import Policy
from megapsft.policy.forward import Head, read
from megapsft.policy.forward import evaluate as forward
from megapsft.types import Sample

ROW = "hand-off.json"  # in the folder of a stage
AT_ONCE = 64  # responses in a pass
PACK_LENGTH = 4096  # positions of a microbatch; more where a response needs more

Response = tuple[list[int], list[int]]  # ids of the prompt, ids of the response


@dataclass(frozen=True)
class Tokens:
    """Of the response tokens of some responses, in one order for all models."""

    logprobs: np.ndarray  # [tokens] fp64, nats
    entropy: np.ndarray  # [tokens] fp64, nats, of the whole vocabulary


def measure(plan: PipelinePlan, stage: str) -> list[dict[str, Any]]:
    """A row for each benchmark: `stage`, `benchmark`, `problems`, `n`, `avg`, `pass@k`, each with its `_se`, and

        length   tokens of a response, a mean over problems as `avg`
        entropy  mean over response tokens of the policy's, over the whole vocabulary at temperature 1
        kl_k1    mean over response tokens of l - l_start
        kl_k3    mean over response tokens of exp(l_start - l) - 1 - (l_start - l)

    with l the log-probability, at temperature 1, of a token of the stage's own responses. Both estimate the KL divergence of the
    policy from the first model, a token, where responses are sampled at temperature 1 with top_p 1. What is in
    RUN/<stage>/hand-off.json of the same responses and weights is not measured again.

    Source of k1 and k3: Approximating KL Divergence (Schulman, 2020).
    """
    folder, model, first = plan.folder / stage, plan.config.export(stage), plan.config.export(START)
    out = folder / "evaluate"
    evaluated = evaluate(
        model,
        plan.tasks,
        plan.template,
        out,
        options=RolloutConfig(),
        dtype=dtype_of(model),
        rewards=plan.rewards,
        ks=plan.config.compare.k or None,
    )
    responses = [_responses(out / f"{task.benchmark.name}.jsonl") for task in plan.tasks]
    decides = _identity(model, first, responses, evaluated)
    rows = _kept(folder / ROW, decides)
    if rows is None:
        own = _tokens(model, responses, plan.template, out)
        before = own if stage == START else _tokens(first, responses, plan.template, out)
        rows = [_row(stage, *one) for one in zip(evaluated, own, before, strict=True)]
        write_whole(folder / ROW, json.dumps({"identity": decides, "rows": rows}, indent=1) + "\n")
    _release()
    return rows


def _row(stage: str, one: Evaluated, own: Tokens, before: Tokens) -> dict[str, Any]:
    metrics = {key.rpartition("/")[2]: value for key, value in one.metrics.items()}
    ahead = before.logprobs - own.logprobs
    row = {
        "stage": stage,
        "benchmark": one.result.benchmark,
        "problems": len(one.result.scores),
        "n": one.task.n,
        **metrics,
        "tokens": len(own.logprobs),
        "entropy": float(own.entropy.mean()),
        "kl_k1": float(-ahead.mean()) + 0.0,
        "kl_k3": float((np.expm1(ahead) - ahead).mean()),
    }
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def _tokens(model: Path, responses: Sequence[Sequence[Response]], template: ChatTemplate, work: Path) -> list[Tokens]:
    """Of the responses to each benchmark, by the model in the folder."""
    with open_engine(model, RolloutConfig(), dtype_of(model), work) as opened:
        return [response_tokens(opened.engine.policy, some, template.pad_token_id) for some in responses]


def response_tokens(policy: Policy, responses: Sequence[Response], pad_token_id: int) -> Tokens:
    """Log-probability and entropy of every response token given what is before it, in one process."""
    logprobs, entropy = [], []
    for start in range(0, len(responses), AT_ONCE):
        samples = []
        for prompt_ids, response_ids in responses[start : start + AT_ONCE]:
            ids = np.array([*prompt_ids, *response_ids], dtype=np.int32)
            samples.append(Sample(token_ids=ids, loss_mask=np.arange(len(ids)) >= len(prompt_ids), source="hand-off"))
        batch = pack(
            [(sample,) for sample in samples], minibatch_size=len(samples), aggregation="token-mean", pad_token_id=pad_token_id,
            layout=Layout(packing=True, pack_length=max(PACK_LENGTH, *map(len, samples)), micro_batch_size=1),
        )  # fmt: skip
        (minibatch,) = batch.minibatches
        for microbatch, output in zip(minibatch.microbatches, forward(policy, minibatch, Head()), strict=True):
            found = read(output)
            logprobs.append(found.logprobs.cpu()[microbatch.loss_mask].double().numpy())
            entropy.append(found.entropy.cpu()[microbatch.loss_mask].double().numpy())
    return Tokens(np.concatenate(logprobs), np.concatenate(entropy))


def _responses(path: Path) -> list[Response]:
    """Of the file that `evaluate` wrote, by row and number."""
    records = sorted(map(json.loads, path.read_text().splitlines()), key=lambda record: (record["row"], record["number"]))
    return [(record["prompt_token_ids"], record["rollouts"][0]["token_ids"]) for record in records]


def _identity(model: Path, first: Path, responses: Sequence[Sequence[Response]], evaluated: Sequence[Evaluated]) -> str:
    """Of all that decides the rows."""
    results = [[one.task.n, one.result.benchmark, one.result.scores, dict(one.metrics)] for one in evaluated]
    content = json.dumps([weights_digest(model), weights_digest(first), responses, results])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _kept(path: Path, decides: str) -> list[dict[str, Any]] | None:
    """The rows of an earlier attempt; None where there are none, or of other responses or weights."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found["rows"] if isinstance(found, dict) and found.get("identity") == decides else None


def _release() -> None:
    """The next stage has the device for itself."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
