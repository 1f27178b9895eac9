"""Splits of the same run that fit on the same GPUs, those that take least time first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from megapsft.cluster.estimate import Estimate, estimate
from megapsft.cluster.hardware import Machines
from megapsft.config import Config, ParallelConfig
from megapsft.errors import Refused
from megapsft.models.hf_config import HFConfig
from megapsft.train.phases import phases, reference_needs

MOST_STAGES = 16
MOST_EXPERT_RANKS = 64
CONTEXT = (1, 2, 4, 8)
RECOMPUTE = (None, "full")


def propose(config: Config, hf: HFConfig, machines: Machines, count: int) -> list[Estimate]:
    """At most `count` estimates that fit, by seconds of a step; what is trained is the same in all of them.

    Of splits that differ in tensor, pipeline, context or expert parallelism each comes once, with the recomputation and the
    virtual stages that suit it best. All shard the optimizer and overlap its traffic as far as the reference allows.
    """
    best: dict[tuple[int, ...], Estimate] = {}
    phase = phases(config)[-1]
    for parallel in candidates(config, hf, machines, compares=bool(reference_needs(phase.objective))):
        try:
            found = estimate(dataclasses.replace(config, parallel=parallel), hf, machines, phase=phase)
        except Refused:  # not a split of this model or of so many GPUs
            continue
        mesh = found.mesh
        split = (mesh.tp, mesh.pp, mesh.cp, mesh.ep)
        if found.fits and (split not in best or found.time.total < best[split].time.total):
            best[split] = found
    return sorted(best.values(), key=lambda one: one.time.total)[:count]


def candidates(config: Config, hf: HFConfig, machines: Machines, compares: bool) -> Iterator[ParallelConfig]:
    """Sizes that divide the model; tensor parallelism within a machine.

    Args:
        compares: whether the objective has a reference.
    """
    stages = [pp for pp in divisors(hf.num_hidden_layers) if pp <= MOST_STAGES]
    experts = [ep for ep in divisors(hf.num_experts or 1) if ep <= MOST_EXPERT_RANKS]
    swaps = compares and config.reference.placement == "swap"  # exchanges weights that might still be gathered
    for tp in (tp for tp in divisors(machines.gpus_per_node) if hf.num_key_value_heads % tp == 0):
        for pp in stages:
            for vpp in [None, *(n for n in divisors(hf.num_hidden_layers // pp) if pp > 1 and n > 1)][:3]:
                for cp in CONTEXT:
                    for ep in experts:
                        for recompute in RECOMPUTE:
                            yield dataclasses.replace(
                                config.parallel,
                                tensor_model_parallel_size=tp,
                                pipeline_model_parallel_size=pp,
                                virtual_pipeline_model_parallel_size=vpp,
                                context_parallel_size=cp,
                                expert_model_parallel_size=ep,
                                expert_tensor_parallel_size=1 if ep > 1 else None,
                                sequence_parallel=True if tp > 1 else None,
                                use_distributed_optimizer=True,
                                overlap_grad_reduce=True,
                                overlap_param_gather=not swaps,
                                overlap_p2p_comm=None,
                                batch_p2p_comm=None,
                                recompute_granularity=recompute,
                                recompute_modules=ParallelConfig().recompute_modules,
                            )


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def overrides(parallel: ParallelConfig) -> list[str]:
    """The `parallel.key=value` that make this split of the defaults."""
    default = ParallelConfig()
    changed = {field.name: getattr(parallel, field.name) for field in dataclasses.fields(default)}
    shown = {name: value for name, value in changed.items() if value != getattr(default, name)}
    return [f"parallel.{name}={str(value).lower()}" for name, value in shown.items()]
