"""Passes without gradient that fill in what an objective compares the policy with: its old self, its reference, its entropy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from megapsft.policy.build import Policy
from megapsft.policy.forward import Head, evaluate, read
from megapsft.policy.reference import Reference
from megapsft.types import Minibatch


def with_old_policy(policy: Policy, minibatch: Minibatch) -> Minibatch:
    """The minibatch with `old_logprobs` and `old_entropy` of the present weights (where the rank has a head).

    And with its `routing`, where the training pass is to choose the same experts.
    """
    routing: list[dict[int, Tensor]] | None = [] if policy.routing_replay else None
    outputs = [read(output) for output in evaluate(policy, minibatch, at_once=policy.no_grad_microbatches, routing=routing)]
    minibatch = _attach(minibatch, [{"routing": one} for one in routing or ()])
    return _attach(minibatch, [{"old_logprobs": o.logprobs, "old_entropy": o.entropy} for o in outputs])


def with_entropy(policy: Policy, minibatch: Minibatch) -> Minibatch:
    """The minibatch with the `entropy` of the present weights."""
    outputs = evaluate(policy, minibatch, at_once=policy.no_grad_microbatches)
    return _attach(minibatch, [{"entropy": read(output).entropy} for output in outputs])


def with_reference(policy: Policy, reference: Reference, minibatch: Minibatch, needs: frozenset[str]) -> Minibatch:
    """The minibatch with what is needed of the reference: `ref_logprobs`, `ref_hidden`."""
    found: list[dict[str, Tensor]] = [{} for _ in minibatch.microbatches]
    own = without_routing(minibatch)  # its experts are its own choice
    with reference.in_place_of(policy) as frozen:
        if "ref_logprobs" in needs and minibatch.microbatches[0].ref_logprobs is None:
            outputs = evaluate(frozen, own, at_once=policy.no_grad_microbatches)
            found = [one | {"ref_logprobs": read(o).logprobs} for one, o in zip(found, outputs, strict=False)]
        if "ref_hidden" in needs:
            outputs = evaluate(frozen, own, Head(hidden=True))
            dtype = policy.config.params_dtype  # Megatron hands out fp32
            hidden = (output.transpose(0, 1).to(dtype).contiguous() for output in outputs)
            found = [one | {"ref_hidden": h} for one, h in zip(found, hidden, strict=False)]
    return _attach(minibatch, found)


def without_routing(minibatch: Minibatch) -> Minibatch:
    """For another model than the policy."""
    microbatches = tuple(dataclasses.replace(m, routing=None, rollout_routing=None) for m in minibatch.microbatches)
    return dataclasses.replace(minibatch, microbatches=microbatches)


def _attach(minibatch: Minibatch, found: Sequence[dict[str, Any]]) -> Minibatch:
    """With what was found for each microbatch; as it is, where the rank has no head and found nothing."""
    if not found:
        return minibatch
    microbatches = tuple(dataclasses.replace(m, **one) for m, one in zip(minibatch.microbatches, found, strict=True))
    return dataclasses.replace(minibatch, microbatches=microbatches)
