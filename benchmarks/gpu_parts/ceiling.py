"""The most that this device gives: matrix products by the library that torch calls, and a copy."""

from __future__ import annotations

from typing import Any

import torch

from gpu_parts.device import Device
from gpu_parts.lines import Lines, Unmet
from gpu_parts.sizes import Sizes

AT_ONCE = 5


def measure(lines: Lines, sizes: Sizes, device: Device, part: str) -> None:
    for dtype in ("bf16", "fp8"):
        for m, k, n in shapes(sizes):
            lines.add(f"{dtype} {m}x{k}x{n}", lambda dtype=dtype, shape=(m, k, n): product(dtype, shape, sizes, device))
    lines.add("copy", lambda: copy(sizes, device))


def shapes(sizes: Sizes) -> list[tuple[int, int, int]]:
    """(m, k, n): those asked for, and the head's: logits, and the gradients of hidden and of weight, of the fewest tokens."""
    found = list(sizes.products)
    for hidden in sorted({hidden for hidden, _ in sizes.heads}):
        tokens, vocabulary = min(t for h, t in sizes.heads if h == hidden), sizes.vocabulary
        found += [(tokens, hidden, vocabulary), (tokens, vocabulary, hidden), (vocabulary, tokens, hidden)]
    return found


def product(dtype: str, shape: tuple[int, int, int], sizes: Sizes, device: Device) -> dict[str, Any]:
    """[m, k] x [k, n] of random numbers; bf16 comes out of both."""
    m, k, n = shape
    left, right = (torch.randn(rows, k, device=device.torch, dtype=torch.bfloat16) for rows in (m, n))
    if dtype == "bf16":

        def run() -> None:
            torch.mm(left, right.T)
    else:
        if device.kind != "cuda":
            raise Unmet("needs CUDA")
        left, right = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn)
        one = torch.ones((), device=device.torch)

        def run() -> None:
            torch._scaled_mm(left, right.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    seconds = device.seconds(run, sizes.repeats, warm_up=3, at_once=AT_ONCE)
    return {"seconds": seconds, "flop": 2 * m * k * n}


def copy(sizes: Sizes, device: Device) -> dict[str, Any]:
    """From one place of the device's memory to another."""
    source = torch.randint(256, (sizes.copied,), dtype=torch.uint8, device=device.torch)
    target = torch.empty_like(source)
    seconds = device.seconds(lambda: target.copy_(source), sizes.repeats, warm_up=3, at_once=AT_ONCE)
    return {"seconds": seconds, "bytes": 2 * sizes.copied}  # read, and written
