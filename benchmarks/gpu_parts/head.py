"""The head: log-probabilities of labels from hidden states, forward alone, and forward and backward, and the memory of that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_parts.device import Device
from gpu_parts.lines import Lines, Unmet
from gpu_parts.sizes import Sizes
from megapsft.policy.vocab_parallel import vocab_parallel_logprobs

Head = Callable[[Tensor, Tensor, Tensor], Tensor]
SAMPLED = 16  # tokens whose log-probabilities are made in fp32 as well
PLAIN = "plain"


def measure(lines: Lines, sizes: Sizes, device: Device, part: str) -> None:
    for hidden, tokens in sizes.heads:
        for name in implementations(sizes):
            lines.add(
                f"D={hidden} T={tokens} {name}", lambda name=name, shape=(hidden, tokens): one(name, shape, sizes, device)
            )


def implementations(sizes: Sizes) -> dict[str, tuple[str, int]]:
    """Name -> backend and bytes of a slab of fp32 logits; plain holds all logits."""
    large, default = sizes.slabs
    return {
        "triton": ("triton", large),
        "triton, default slabs": ("triton", default),
        "torch": ("torch", large),
        PLAIN: (PLAIN, 0),
    }


def one(name: str, shape: tuple[int, int], sizes: Sizes, device: Device) -> dict[str, Any]:
    backend, chunk_bytes = implementations(sizes)[name]
    if backend == "triton" and device.kind != "cuda":
        raise Unmet("needs CUDA")
    run = plain if backend == PLAIN else ours(backend, chunk_bytes)
    hidden, weight, labels = operands(shape, sizes.vocabulary, device)
    with torch.no_grad():
        forward = device.seconds(lambda: run(hidden, weight, labels), sizes.repeats)
        difference = against_fp32(run, hidden, weight, labels)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(hidden, weight, labels).mean(), (hidden, weight))

    seconds = device.seconds(both, sizes.repeats)
    gradients = 2 * (hidden.numel() + weight.numel())
    return {
        "forward_seconds": forward,
        "forward_backward_seconds": seconds,
        "peak_bytes_beside_gradients": max(0, device.grown_by(both) - gradients),
        "forward_flop": 2 * hidden.numel() * len(weight),
        "products": 6 if backend == PLAIN else 8,  # of T V D: slabs are made again in the backward pass
        "chunk_bytes": chunk_bytes,
        "largest_difference_of_logprobs": difference,
    }


def ours(backend: str, chunk_bytes: int) -> Head:
    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return vocab_parallel_logprobs(
            hidden, weight, labels, None, len(weight), chunk_bytes, entropy_gradient=False, backend=backend
        )[0]

    return run


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """All logits, then the cross entropy in fp32, as `transformers` does it."""
    return -F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")


def operands(shape: tuple[int, int], vocabulary: int, device: Device) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight, labels: logits of about 1.5, in bf16."""
    width, tokens = shape
    generator = torch.Generator(device.torch).manual_seed(tokens)

    def normal(rows: int, scale: float) -> Tensor:
        numbers = torch.randn(rows, width, generator=generator, device=device.torch) * scale
        return numbers.to(torch.bfloat16).requires_grad_()

    labels = torch.randint(vocabulary, (tokens,), generator=generator, device=device.torch)
    return normal(tokens, 1.0), normal(vocabulary, 1.5 / width**0.5), labels


def against_fp32(run: Head, hidden: Tensor, weight: Tensor, labels: Tensor) -> float:
    """The largest difference of log-probabilities of some tokens from those of fp32 logits of the same operands."""
    rows = torch.linspace(0, len(hidden) - 1, SAMPLED, device=hidden.device).long()
    exact = (hidden[rows].float() @ weight.float().T).log_softmax(-1).gather(1, labels[rows, None]).squeeze(1)
    return float((run(hidden, weight, labels)[rows] - exact).abs().max())
