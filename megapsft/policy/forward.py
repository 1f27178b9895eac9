"""Megatron's pipeline schedule over the microbatches of an update: the training pass, and the old-policy pass.

Both passes run the same microbatches through the same kernels, so with unchanged weights they give the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megapsft.policy.build import Policy, unwrap
from megapsft.types import Microbatch, Minibatch, PolicyOutput

Consume = Callable[[PolicyOutput, Microbatch], tuple[Tensor, Any]]


def forward_backward(policy: Policy, minibatch: Minibatch, consume: Consume) -> list[Any]:
    """Forward and backward over all microbatches; gradients end in `main_grad`, reduced over all ranks.

    Args:
        consume: called on the last pipeline stage with each microbatch's output; returns the scalar whose gradient is wanted,
            and something to hand back. Gradients are of the sum over the update of these scalars.

    Returns:
        What `consume` handed back, in order; empty on other stages.
    """

    def loss(microbatch: Microbatch, output: Tensor) -> tuple[Tensor, Tensor, Any]:
        scalar, report = consume(PolicyOutput(logprobs=output[..., 0], entropy=output[..., 1]), microbatch)
        # Megatron divides gradients by the all-reduced count of positions
        positions = torch.tensor(microbatch.token_ids.numel(), dtype=torch.int, device=output.device)
        return scalar * minibatch.forward_tokens, positions, report

    for chunk in policy.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    return _schedule(policy, minibatch, loss, forward_only=False)


@torch.no_grad()
def evaluate(policy: Policy, minibatch: Minibatch) -> list[PolicyOutput]:
    """Log-probabilities and entropies of every microbatch, without gradient; empty where the rank has no head."""

    def keep(microbatch: Microbatch, output: Tensor, non_loss_data: bool = True) -> Tensor:
        return output

    for chunk in policy.chunks:
        chunk.eval()
    outputs = _schedule(policy, minibatch, keep, forward_only=True)
    return [PolicyOutput(logprobs=output[..., 0], entropy=output[..., 1]) for output in outputs]


def with_old_policy(policy: Policy, minibatch: Minibatch) -> Minibatch:
    """The minibatch with `old_logprobs` and `old_entropy` of the present weights (where the rank has a head)."""
    outputs = evaluate(policy, minibatch)
    if not outputs:
        return minibatch
    microbatches = tuple(
        dataclasses.replace(microbatch, old_logprobs=output.logprobs, old_entropy=output.entropy)
        for microbatch, output in zip(minibatch.microbatches, outputs, strict=True)
    )
    return dataclasses.replace(minibatch, microbatches=microbatches)


def _schedule(policy: Policy, minibatch: Minibatch, loss: Callable, forward_only: bool) -> list[Any]:
    def step(microbatches: Iterator[Microbatch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
        microbatch = _to(next(microbatches), policy.device)
        gpt = unwrap(model)
        if gpt.post_process:
            gpt.output_layer.labels = microbatch.labels
        output = model(
            microbatch.token_ids, microbatch.position_ids, None, packed_seq_params=_packed_seq_params(microbatch)
        )
        return output, partial(loss, microbatch)

    first = minibatch.microbatches[0]
    iterators = [iter(minibatch.microbatches) for _ in policy.chunks]
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=policy.chunks if len(policy.chunks) > 1 else policy.chunks[0],
        num_microbatches=len(minibatch.microbatches),
        seq_length=first.token_ids.shape[1] * policy.mesh.cp,
        micro_batch_size=first.token_ids.shape[0],
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def _packed_seq_params(microbatch: Microbatch) -> PackedSeqParams | None:
    if microbatch.cu_seqlens is None:
        return None
    offsets = microbatch.cu_seqlens
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        cu_seqlens_q_padded=offsets,
        cu_seqlens_kv_padded=offsets,
        max_seqlen_q=microbatch.max_seqlen,
        max_seqlen_kv=microbatch.max_seqlen,
    )


def _to(microbatch: Microbatch, device: torch.device) -> Microbatch:
    tensors = {
        field.name: value.to(device, non_blocking=True)
        for field in dataclasses.fields(microbatch)
        if isinstance(value := getattr(microbatch, field.name), Tensor)
    }
    return dataclasses.replace(microbatch, **tensors)
