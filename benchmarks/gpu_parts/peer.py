"""The same slice as `transformers` has it: its model, its loss, torch's fused AdamW over bf16 parameters, and no padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from gpu_parts.device import Device
from gpu_parts.lines import Lines
from gpu_parts.sizes import Packing, Sizes

LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, CLIP = 1e-6, (0.9, 0.999), 1e-8, 0.1, 1.0  # as in megapsft.config


@dataclass
class Peer:
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    device: Device
    sizes: Sizes


def measure(lines: Lines, sizes: Sizes, device: Device, part: str) -> None:
    """Parts are named SLICE-peer."""
    made: list[Peer] = []

    def build_it() -> dict[str, Any]:
        return {"seconds": [device.once(lambda: made.append(build(sizes.of(part.partition("-")[0]), sizes, device)))]}

    lines.add("build", build_it)
    if not made:
        return
    config = made[0].model.config
    sparse = hasattr(config, "num_experts")
    lines.facts.update(
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        parameters=sum(p.numel() for p in made[0].model.parameters()),
        attention=config._attn_implementation,
        experts=getattr(config, "_experts_implementation", None) if sparse else None,
        balance="random router weights on random tokens" if sparse else None,
        optimizer="torch.optim.AdamW, fused, over bf16 parameters: no fp32 copies",
    )
    for packing in sizes.packings:
        lines.add(f"{packing.name} sft", lambda packing=packing: sft(made[0], packing))


def build(raw: dict[str, Any], sizes: Sizes, device: Device) -> Peer:
    rest = {key: value for key, value in raw.items() if key not in ("model_type", "architectures")}
    config = transformers.AutoConfig.for_model(raw["model_type"], **rest)
    with device.torch:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
    )
    return Peer(model, optimizer, device, sizes)


def sft(made: Peer, packing: Packing) -> dict[str, Any]:
    """Updates of as many tokens as ours; a batch has the samples of a pack, fewer where memory does not suffice."""
    tokens, labels = rows(made, packing)
    at_once, losses = packing.positions // packing.sample, []
    while True:
        try:
            losses.append(step(made, tokens, labels, at_once))
            break
        except torch.OutOfMemoryError:
            if at_once == 1:
                raise
            at_once //= 2
        made.optimizer.zero_grad()
        made.device.free()
    made.device.forget_peak()
    seconds = made.device.seconds(
        lambda: losses.append(step(made, tokens, labels, at_once)), made.sizes.updates, warm_up=0
    )
    return {
        "tokens": tokens.numel(),
        "seconds": seconds,
        "rows_at_once": at_once,
        "peak_bytes": made.device.peak(),
        "losses": losses,
    }


def step(made: Peer, tokens: Tensor, labels: Tensor, at_once: int) -> float:
    """One update, and its loss."""
    total = torch.zeros((), device=tokens.device)
    trained = (labels[:, 1:] >= 0).sum()
    for start in range(0, len(tokens), at_once):
        part = slice(start, start + at_once)
        loss = made.model(input_ids=tokens[part], labels=labels[part], num_items_in_batch=trained, use_cache=False).loss
        loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_(made.model.parameters(), CLIP)
    made.optimizer.step()
    made.optimizer.zero_grad()
    return total.item()


def rows(made: Peer, packing: Packing) -> tuple[Tensor, Tensor]:
    """[samples, length] random tokens, and labels that are -100 on the first quarter, as ours are not trained there."""
    generator = torch.Generator(made.device.torch).manual_seed(0)
    shape = made.sizes.tokens // packing.sample, packing.sample
    tokens = torch.randint(made.model.config.vocab_size, shape, generator=generator, device=made.device.torch)
    labels = tokens.clone()
    labels[:, : packing.sample // 4] = -100
    return tokens, labels
