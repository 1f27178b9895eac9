"""All logits at once, gathered over the tensor-parallel ranks, and torch's autograd: slow, large, and plain."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megapsft.policy.head.chunked import Vocabulary
from megapsft.policy.head.statistics import SLOPE


def logprobs_entropy_term(
    hidden: Tensor, weight: Tensor, labels: Tensor, ref_hidden: Tensor | None, ref_weight: Tensor | None, vocabulary: Vocabulary,
    valid_vocab: int,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """As `chunked.Slabs`, but for `labels`, which are of the whole vocabulary."""
    z = _all_logits(hidden, weight, vocabulary, valid_vocab)
    log_p = z.log_softmax(-1)
    logprobs = log_p.gather(1, labels[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    if not vocabulary.entropy_gradient:
        entropy = entropy.detach()
    term = vocabulary.term
    if term is None:
        return logprobs, entropy, None
    if term.kind == "gem":
        q = (z / term.beta).softmax(-1).detach()
        target = z.gather(1, labels[:, None])
        h = torch.ones_like(z) if term.h == "linear" else torch.sigmoid(SLOPE * (z - target)).detach()
        return logprobs, entropy, (q * h * (log_p - logprobs[:, None])).sum(-1)
    with torch.no_grad():
        log_q = _all_logits(ref_hidden, ref_weight, vocabulary, valid_vocab).log_softmax(-1)
    if term.kind == "reverse_kl":
        return logprobs, entropy, (log_p.exp() * (log_p - log_q)).sum(-1)
    return logprobs, entropy, (log_q.exp() * (log_q - log_p)).sum(-1)


def _all_logits(hidden: Tensor, weight: Tensor, vocabulary: Vocabulary, valid_vocab: int) -> Tensor:
    """[T, valid_vocab] fp32 (or fp64)."""
    logits = hidden @ weight.T
    if vocabulary.group is not None:
        logits = gather_from_tensor_model_parallel_region(logits, group=vocabulary.group)
    return logits[:, :valid_vocab].to(torch.promote_types(hidden.dtype, torch.float32)) / vocabulary.temperature
