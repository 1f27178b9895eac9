"""The output layer as a distribution: log-probability, entropy and full-vocabulary terms over tensor-parallel shards of logits.

With logits z = h W^T / temperature, lse = logsumexp(z), p = exp(z - lse), label y:

    log-probability  l = z_y - lse             dl/dz = 1[y] - p
    entropy          H = lse - sum_v p_v z_v   dH/dz = -p (z - sum_v p_v z_v)
    reverse KL p (log p - log q - KL), forward KL p - q, GEM q h - 1[y] sum_v q_v h_v: the gradients of a VocabularyTerm

Backends: `torch` goes by slabs of a byte budget and never holds all logits (head/chunked.py), `triton` is the same with fused
kernels on CUDA, `reference` is all logits at once with autograd. One collective: the statistics of each token are all-gathered,
and merged alike on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megapsft.errors import Refused
from megapsft.platform.ranges import span
from megapsft.policy.backend import Backend, kernels
from megapsft.policy.head import reference
from megapsft.policy.head.chunked import Slabs, Vocabulary
from megapsft.types import VocabularyTerm


@dataclass(frozen=True, kw_only=True)
class HeadRequest:
    """What the next forward pass is to compute."""

    labels: Tensor  # [B, S] int64
    temperature: float = 1.0  # divides the logits, of the reference as well
    entropy_gradient: bool = False  # False: the entropy is a constant, which halves the elementwise work of the backward
    term: VocabularyTerm | None = None
    ref_hidden: Tensor | None = None  # of the KLs: what the reference's output layer reads, of the shape of what this one reads
    ref_weight: Tensor | None = None  # [V / p, D] the reference's output weight


class LogprobHead(ColumnParallelLinear):
    """Megatron's output layer, giving what `request` asks for instead of logits.

    It stays the module that Megatron built (same parameter, same hooks of DistributedDataParallel, same checkpoint key, tied or
    not), so `adopt` changes its class in place. Without a request it gives logits, as before; "hidden" passes its input through.
    """

    request: HeadRequest | Literal["hidden"] | None
    valid_vocab: int
    chunk_bytes: int
    backend: Backend

    @classmethod
    def adopt(
        cls, layer: ColumnParallelLinear, valid_vocab: int, chunk_bytes: int, backend: Backend = "torch"
    ) -> LogprobHead:
        layer.__class__ = cls
        layer.request, layer.valid_vocab, layer.chunk_bytes, layer.backend = None, valid_vocab, chunk_bytes, backend
        return layer

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """[S, B, D] (or its sequence-parallel shard) -> [S, B, C] fp32: log-probability, entropy and, if asked for, the term."""
        request = self.request
        if request is None:
            return super().forward(input_, weight, runtime_gather_output)
        if request == "hidden":
            return input_, None
        hidden = self.whole(input_)
        term = {}
        if request.term is not None and request.term.kind != "gem":
            term = {"ref_hidden": self.whole(request.ref_hidden).flatten(0, 1), "ref_weight": request.ref_weight}
        outputs = vocab_parallel_logprobs(
            hidden.flatten(0, 1),
            self.weight if weight is None else weight,
            request.labels.transpose(0, 1).reshape(-1),
            self.tp_group,
            self.valid_vocab,
            self.chunk_bytes,
            temperature=request.temperature,
            entropy_gradient=request.entropy_gradient,
            term=request.term,
            backend=self.backend,
            **term,
        )
        return torch.stack(outputs, dim=-1).view(*hidden.shape[:2], len(outputs)), None

    def whole(self, hidden: Tensor) -> Tensor:
        """[S, B, D] on every rank; in the backward pass the gradients of the ranks' shards of the vocabulary are added."""
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)


@span("head")
def vocab_parallel_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup | None,
    valid_vocab: int,
    chunk_bytes: int,
    *,
    temperature: float = 1.0,
    entropy_gradient: bool = True,
    term: VocabularyTerm | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    backend: Backend = "torch",
) -> tuple[Tensor, ...]:
    """Log-probability of each label, entropy of each position and, where asked for, the term.

    Args:
        hidden: [T, D], the same on every rank of `group`; its gradient comes back as this rank's part, to be summed.
        weight: [V / p, D], this rank's rows of the padded vocabulary.
        labels: [T] int64, in [0, valid_vocab).
        valid_vocab: rows of the true vocabulary; the padded rows beyond have probability 0 and no gradient.
        chunk_bytes: of one slab of fp32 logits; one or two are held at once (with a reference, two more), and one until the
            backward where it has all tokens and columns.
        temperature: divides the logits.
        entropy_gradient: whether the returned entropy carries a gradient.
        ref_hidden: [T, D] and `ref_weight` [V / p, D], of the reference policy, where `term` is a KL; constants.

    Returns:
        logprobs [T], entropy [T] (, term [T]) in fp32 (fp64 for fp64 inputs), nats, the same on every rank of `group`.

    Raises:
        Refused: a vocabulary beyond the rows; a backend that is not there.
    """
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    if valid_vocab > weight.shape[0] * size:
        rows = weight.shape[0] * size
        raise Refused(f"vocabulary of {valid_vocab}", f"exceeds the {rows} rows of the output layer", "check config.json")
    first = rank * weight.shape[0]
    vocabulary = Vocabulary(
        group=group if size > 1 else None,
        first=first,
        columns=max(0, min(valid_vocab - first, weight.shape[0])),
        chunk_bytes=chunk_bytes,
        temperature=temperature,
        entropy_gradient=entropy_gradient,
        term=term,
        **({"blocks": kernels()} if backend == "triton" else {}),
    )
    if backend == "reference":
        outputs = reference.logprobs_entropy_term(hidden, weight, labels, ref_hidden, ref_weight, vocabulary, valid_vocab)
    else:
        outputs = Slabs.apply(hidden, weight, labels, ref_hidden, ref_weight, vocabulary)
    return outputs if term is not None else outputs[:2]
