"""Megatron's pipeline schedule over the microbatches of an update: the training pass, and passes without gradient.

Both run the same microbatches through the same kernels, so with unchanged weights they give the same bits (unless a pass
without gradient is told to take several microbatches at once).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megapsft.models.router import BalanceLoss, routed
from megapsft.platform.ranges import span
from megapsft.policy.build import Policy, unwrap
from megapsft.policy.merge import merge, split
from megapsft.policy.routing import cut_routing
from megapsft.policy.vocab_parallel import HeadRequest
from megapsft.types import Microbatch, Minibatch, PolicyOutput, VocabularyTerm

Consume = Callable[[Tensor, Microbatch], tuple[Tensor, Any]]


@dataclass(frozen=True, kw_only=True)
class Head:
    """What a pass asks of the output layer, beside the log-probabilities of the labels."""

    entropy_gradient: bool = False
    term: VocabularyTerm | None = None
    ref_weight: Tensor | None = None  # [V / p, D] of the reference's output layer, for the KLs of `term`
    hidden: bool = False  # the hidden states that it reads, and nothing else

    def request(self, microbatch: Microbatch, temperature: float) -> HeadRequest | str:
        if self.hidden:
            return "hidden"
        return HeadRequest(
            labels=microbatch.labels,
            temperature=temperature,
            entropy_gradient=self.entropy_gradient,
            term=self.term,
            ref_hidden=microbatch.ref_hidden,
            ref_weight=self.ref_weight,
        )


def forward_backward(
    policy: Policy,
    minibatch: Minibatch,
    consume: Consume,
    head: Head | None = Head(),
    balance: BalanceLoss | None = None,
) -> list[Any]:
    """Forward and backward over all microbatches; gradients end in `main_grad`, reduced over all ranks.

    Args:
        consume: called on the last pipeline stage with each microbatch and what the model's output layer gave, [B, S, C]
            (`read` makes a PolicyOutput of it); returns the scalar whose gradient is wanted, and something to hand back.
            Gradients are of the sum over the update of these scalars.
        head: what to ask of a LogprobHead; None where the output layer is something else.
        balance: of the experts, to be added to the sum.

    Returns:
        What `consume` handed back, in order; empty on other stages.
    """

    def loss(microbatch: Microbatch, output: Tensor) -> tuple[Tensor, Tensor, Any]:
        scalar, report = consume(output, microbatch)
        # Megatron divides gradients by the all-reduced count of positions
        positions = torch.tensor(microbatch.token_ids.numel(), dtype=torch.int, device=output.device)
        return scalar * minibatch.forward_tokens, positions, report

    for chunk in policy.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    return _schedule(policy, minibatch, loss, head, forward_only=False, balance=balance)


@torch.no_grad()
def evaluate(
    policy: Policy,
    minibatch: Minibatch,
    head: Head | None = Head(),
    at_once: int = 1,
    routing: list[dict[int, Tensor]] | None = None,
) -> list[Tensor]:
    """What the output layer gives for every microbatch, [B, S, C], without gradient; empty where the rank has none.

    Args:
        at_once: so many packed microbatches may go through the model as one.
        routing: extended by the experts that each microbatch's tokens went to on this rank, by MoE layer.
    """

    def keep(microbatch: Microbatch, output: Tensor, non_loss_data: bool = True) -> Tensor:
        return output

    for chunk in policy.chunks:
        chunk.eval()
    merged, size = merge(minibatch, at_once, policy.mesh.pp if policy.mesh.vpp > 1 else 1)
    records: list[dict[int, Tensor]] = [{} for _ in merged.microbatches]
    outputs = _schedule(policy, merged, keep, head, forward_only=True, records=None if routing is None else records)
    if routing is not None:
        routing.extend(records if size == 1 else _cut(policy, minibatch, records, size))
    return split(outputs, minibatch, size)


def _cut(policy: Policy, minibatch: Minibatch, records: list[dict[int, Tensor]], size: int) -> list[dict[int, Tensor]]:
    """The routing of each microbatch out of that of the merged ones."""
    lengths = [microbatch.token_ids.shape[1] for microbatch in minibatch.microbatches]
    group = parallel_state.get_tensor_model_parallel_group() if policy.mesh.sequence_parallel else None
    parts = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    return [one for record, part in zip(records, parts, strict=True) for one in cut_routing(record, part, group)]


def read(output: Tensor) -> PolicyOutput:
    """The channels of the head, [B, S, 2 or 3]."""
    return PolicyOutput(logprobs=output[..., 0], entropy=output[..., 1], term=output[..., 2] if output.shape[-1] == 3 else None)


def _schedule(
    policy: Policy,
    minibatch: Minibatch,
    loss: Callable,
    head: Head | None,
    forward_only: bool,
    balance: BalanceLoss | None = None,
    records: list[dict[int, Tensor]] | None = None,
) -> list[Any]:
    def step(batches: Iterator[tuple[Microbatch, Any]], model: torch.nn.Module) -> tuple[Tensor, Callable]:
        microbatch, record = next(batches)
        microbatch = to_device(microbatch, policy.device)
        gpt = unwrap(model)
        if gpt.post_process and head is not None:
            gpt.output_layer.request = head.request(microbatch, policy.temperature)
        with span("microbatch"), routed(gpt, microbatch, balance=balance, record=record):
            output = model(
                microbatch.token_ids, microbatch.position_ids, None, packed_seq_params=_packed_seq_params(microbatch)
            )
        return output, partial(loss, microbatch)

    first = minibatch.microbatches[0]
    records = records or [None] * len(minibatch.microbatches)
    iterators = [zip(minibatch.microbatches, records, strict=True) for _ in policy.chunks]
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


def to_device(microbatch: Microbatch, device: torch.device) -> Microbatch:
    """Every tensor of it on the device."""
    tensors = {
        field.name: value.to(device, non_blocking=True)
        for field in dataclasses.fields(microbatch)
        if isinstance(value := getattr(microbatch, field.name), Tensor)
    }
    return dataclasses.replace(microbatch, **tensors)
