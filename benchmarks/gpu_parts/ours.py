"""Steps of SFT and PSFT of a slice of a model, by the code that trains: megapsft.train.update on a Policy."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer

import megapsft.train.update as update_module
from gpu_parts.device import Device
from gpu_parts.lines import Lines
from gpu_parts.sizes import UPDATES_A_STEP, Packing, Sizes
from megapsft import parallel
from megapsft.config import load_config
from megapsft.data.pack import pack
from megapsft.data.plan import Layout
from megapsft.models.families import family_of
from megapsft.models.flops import active_per_token, model_flops
from megapsft.models.hf_config import HFConfig
from megapsft.objectives.registry import build_objective
from megapsft.parallel import plan_mesh
from megapsft.platform.cpu import has_cuda
from megapsft.platform.launch import become_world_of_one
from megapsft.policy.build import Policy, build_chunks, distribute, model_shape, transformer_config
from megapsft.policy.vocab_parallel import vocab_parallel_logprobs
from megapsft.train.optimizer import build_optimizer
from megapsft.train.prepare import with_constants
from megapsft.train.update import update
from megapsft.types import Objective, Sample, TrainBatch

LEARNING_RATE = 1e-6
FORCED = "Megatron's moe_router_force_load_balancing: every token's experts are drawn at random"


@dataclass
class Clock:
    """Seconds of an update's optimizer step, with nothing left to do on the device at both ends."""

    optimizer: float = 0.0

    @contextlib.contextmanager
    def watch(self, device: Device) -> Iterator[None]:
        original = update_module.step_if_finite

        def timed(*arguments: Any) -> float:
            found = []
            self.optimizer += device.once(lambda: found.append(original(*arguments)))
            return found[0]

        update_module.step_if_finite = timed
        try:
            yield
        finally:
            update_module.step_if_finite = original


@dataclass
class Slice:
    """A model of few layers, its optimizer, and the device it lives on."""

    policy: Policy
    optimizer: ChainedOptimizer
    device: Device
    sizes: Sizes
    clock: Clock = field(default_factory=Clock)

    @property
    def hf(self) -> HFConfig:
        return self.policy.hf


def measure(lines: Lines, sizes: Sizes, device: Device, part: str) -> None:
    """Parts are named SLICE-bf16 or SLICE-fp8-RECIPE."""
    name, _, precision = part.partition("-")
    made: list[Slice] = []

    def build_it() -> dict[str, Any]:
        return {"seconds": [device.once(lambda: made.append(build(sizes.of(name), precision, sizes, device)))]}

    try:
        lines.add("build", build_it)
        if made:
            lines.facts.update(facts(made[0]))
            for packing in sizes.packings:
                lines.add(f"{packing.name} sft", lambda packing=packing: sft(made[0], packing))
                lines.add(f"{packing.name} psft", lambda packing=packing: psft(made[0], packing))
    finally:
        made.clear()
        device.free()
        parallel.shutdown()


def build(raw: dict[str, Any], precision: str, sizes: Sizes, device: Device) -> Slice:
    """Random weights, as Megatron draws them; nothing is read from a disk."""
    overrides = ["model.dtype=bfloat16", f"model.logprob_chunk_bytes={sizes.slabs[1]}"]
    if precision.startswith("fp8-"):
        overrides += ["fp8.format=hybrid", f"fp8.recipe={precision.removeprefix('fp8-')}"]
    config = load_config(None, overrides)
    hf = HFConfig.parse(raw)
    family = family_of(hf)
    dispatcher = config.model.moe_token_dispatcher_type
    mesh = plan_mesh(config.parallel, 1, model_shape(hf), has_cuda(), dispatcher)
    become_world_of_one()
    parallel.initialize(mesh, config.parallel, config.train.seed)
    in_fp8 = {} if precision == "bf16" else {"fp8": config.fp8}
    megatron = transformer_config(family, hf, config.model, config.parallel, mesh, **in_fp8)
    if bool(megatron.fp8) != bool(in_fp8):
        raise RuntimeError(f"{precision} was asked for, and the layers are in {megatron.fp8 or 'bf16'}")
    if hf.num_experts:
        megatron.moe_router_force_load_balancing = True
    chunks = distribute(build_chunks(megatron, hf, config.model, mesh), megatron, config.parallel)
    policy = Policy(chunks=chunks, config=megatron, family=family, hf=hf, source=Path(), mesh=mesh)
    return Slice(policy, build_optimizer(config.optimizer, config.parallel, policy), device, sizes)


def facts(made: Slice) -> dict[str, Any]:
    hf = made.hf
    return {
        "layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "parameters": sum(p.numel() for chunk in made.policy.chunks for p in chunk.parameters()),
        "active_weights_of_a_layer": sum(active_per_token(made.hf)),
        "linear": type(made.policy.gpt_models()[0].decoder.layers[0].self_attention.linear_qkv).__name__,
        "head": made.policy.head().backend,
        "optimizer": type(made.optimizer.chained_optimizers[0].optimizer).__name__,
        "balance": FORCED if hf.num_experts else None,
    }


def sft(made: Slice, packing: Packing) -> dict[str, Any]:
    """Updates one after the other on the same samples."""
    objective = build_objective({"name": "sft"})
    (minibatch,) = batch(made, packing, objective, 1).minibatches
    losses = []

    def step() -> None:
        report = update(made.policy, objective, made.optimizer, minibatch, LEARNING_RATE)
        losses.append(report.metrics["train/loss"])

    step()  # compiles, and fills what optimizers and libraries keep
    made.device.forget_peak()
    made.clock.optimizer = 0.0
    with made.clock.watch(made.device):
        seconds = made.device.seconds(step, made.sizes.updates, warm_up=0)
    peak = made.device.peak()
    return {
        **size(made, packing, 1),
        "seconds": seconds,
        "optimizer_seconds": made.clock.optimizer / len(seconds),
        "head_seconds": head_seconds(made, packing) * len(minibatch.microbatches),
        "peak_bytes": peak,
        "losses": losses,
    }


def psft(made: Slice, packing: Packing) -> dict[str, Any]:
    """A step: the pass of the old policy over all but the first update, then the updates."""
    objective = build_objective({"name": "psft"})
    packed = batch(made, packing, objective, UPDATES_A_STEP)
    short = TrainBatch(minibatches=packed.minibatches[:2])
    with_constants(made.policy, None, short, objective)  # warms up the pass without gradient
    made.device.forget_peak()
    old = []
    reports = []

    def step() -> None:
        begin = time.perf_counter()
        ready = with_constants(made.policy, None, packed, objective)
        made.device.synchronize()
        old.append(time.perf_counter() - begin)
        for minibatch in ready.minibatches:
            reports.append(update(made.policy, objective, made.optimizer, minibatch, LEARNING_RATE))

    seconds = made.device.seconds(step, 1, warm_up=0)
    return {
        **size(made, packing, UPDATES_A_STEP),
        "updates": UPDATES_A_STEP,
        "seconds": seconds,
        "old_policy_seconds": old,
        "peak_bytes": made.device.peak(),
        "losses": [report.metrics["train/loss"] for report in reports],
        "ratio_max": [report.metrics["objective/ratio_max"] for report in reports],
    }


def size(made: Slice, packing: Packing, updates: int) -> dict[str, Any]:
    tokens = made.sizes.tokens * updates
    return {"tokens": tokens, "model_flop": model_flops(made.hf, tokens, tokens * packing.sample)}


def batch(made: Slice, packing: Packing, objective: Objective, updates: int) -> TrainBatch:
    """Random tokens; the first quarter of a sample is its prompt."""
    numbers = np.random.default_rng(0)
    count = made.sizes.tokens // packing.sample
    groups = [(sample(numbers, made.hf.vocab_size, packing.sample),) for _ in range(updates * count)]
    layout = Layout(packing=True, pack_length=packing.positions, micro_batch_size=1)
    return pack(groups, minibatch_size=count, layout=layout, aggregation=objective.aggregation, pad_token_id=0)


def sample(numbers: np.random.Generator, vocabulary: int, length: int) -> Sample:
    tokens = numbers.integers(vocabulary, size=length, dtype=np.int32)
    return Sample(token_ids=tokens, loss_mask=np.arange(length) >= length // 4, source="random")


def head_seconds(made: Slice, packing: Packing) -> float:
    """Of the head of one pack, forward and backward, as it stands in the model: what its layers do not take."""
    head = made.policy.head()
    weight = head.weight.detach().requires_grad_()
    if hasattr(head.weight, "main_grad"):  # as in the model its gradient goes there
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(head.weight.main_grad), False
    hidden = torch.randn(packing.positions, made.hf.hidden_size, device=weight.device, dtype=weight.dtype).requires_grad_()
    labels = torch.randint(made.hf.vocab_size, (packing.positions,), device=weight.device)

    def run() -> object:
        logprobs, _ = vocab_parallel_logprobs(
            hidden, weight, labels, None, head.valid_vocab, head.chunk_bytes, entropy_gradient=False, backend=head.backend
        )
        return torch.autograd.grad(logprobs.mean(), (hidden, weight))

    return median(made.device.seconds(run, made.sizes.repeats))
