"""The plan of a run on a cluster, as tables and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megapsft.cluster import efficiency
from megapsft.cluster.estimate import Estimate, StepTime
from megapsft.cluster.fp8 import copies
from megapsft.cluster.memory import ROWS, RUNTIME, USABLE
from megapsft.cluster.propose import overrides
from megapsft.cluster.workload import ASSUMED
from megapsft.models.families import parameter_count
from megapsft.output.whole import write_whole
from megapsft.platform.chips import GB, GIB

MOST_COLUMNS = 4  # stages that are shown; those between are like their neighbours
TIMES = tuple(field.name for field in fields(StepTime))


def show_estimate(found: Estimate, proposals: Sequence[Estimate] | None) -> None:
    """Print memory, time, traffic, what else would fit (None: nobody looked), and what all of that assumes."""
    console = Console()
    machines, hf = found.machines, found.hf
    experts = f", {hf.num_experts} experts (top {hf.num_experts_per_tok})" if hf.num_experts else ""
    console.print(
        f"{hf.architecture}, {parameter_count(hf) / 1e9:.2f} B parameters, {hf.num_hidden_layers} layers{experts}; "
        f"{machines.nodes} x {machines.gpus_per_node} GPUs: {found.mesh.describe()}; a step is {found.work.updates} update(s) of "
        f"{found.work.microbatches} microbatches on each data-parallel rank",
        highlight=False,
        soft_wrap=True,
    )
    console.print(memory_table(found))
    console.print(time_table(found))
    if found.traffic:
        console.print(traffic_table(found))
    console.print(verdict(found), highlight=False, soft_wrap=True)
    if proposals:
        show_proposals(proposals)
    elif proposals is not None and not found.fits:
        console.print("no split of these GPUs fits: use more nodes, a shorter data.pack_length, or larger GPUs", highlight=False)
    for line in assumptions(found):
        console.print(f"[dim]assumed:[/] {line}", highlight=False, soft_wrap=True)


def show_proposals(proposals: Sequence[Estimate]) -> None:
    """Print splits that fit, and how to ask for the first of them."""
    console = Console()
    console.print(proposal_table(proposals))
    console.print("the first of them: " + " ".join(overrides(proposals[0].config.parallel)), highlight=False, soft_wrap=True)


def memory_table(found: Estimate) -> Table:
    """GiB of a rank, by pipeline stage; rows of nothing are left out."""
    shown = _columns(found)
    table = Table()
    table.add_column("memory, GiB")
    for stage in shown:
        table.add_column(f"stage {stage}" if len(found.stages) > 1 else "each rank", justify="right")
    for name in ROWS:
        values = [getattr(found.stages[stage], name) for stage in shown]
        if any(values):
            table.add_row(name.replace("_", " "), *(f"{value / GIB:.2f}" for value in values))
    table.add_section()
    table.add_row("at most", *(f"{found.stages[stage].total / GIB:.2f}" for stage in shown))
    table.add_row("usable", *(f"{found.usable / GIB:.2f}" for _ in shown))
    return table


def _columns(found: Estimate) -> list[int]:
    """The first stages, the fullest and the last."""
    count = len(found.stages)
    if count <= MOST_COLUMNS:
        return list(range(count))
    fullest = max(range(count), key=lambda stage: found.stages[stage].total)
    return sorted({0, 1, fullest, count - 1})


def time_table(found: Estimate) -> Table:
    """Seconds of a step."""
    table = Table()
    table.add_column("time of a step")
    table.add_column("s", justify="right")
    for name in TIMES:
        value = getattr(found.time, name)
        if value:
            table.add_row(name.replace("_", " "), f"{value:.2f}")
    table.add_section()
    table.add_row("a step", f"{found.time.total:.2f}")
    return table


def traffic_table(found: Estimate) -> Table:
    """What a rank sends in a step."""
    table = Table()
    for name in ("traffic of a rank", "ranks", "link", "GB a step", "s if not hidden"):
        table.add_column(name, justify="left" if name in ("traffic of a rank", "link") else "right")
    for one in found.traffic:
        table.add_row(one.purpose, str(one.group), one.link, f"{one.sent / GB:.1f}", f"{one.seconds:.2f}")
    return table


def verdict(found: Estimate) -> str:
    """Whether it fits, and how fast it is."""
    each = found.tokens_per_second / found.machines.world_size
    speed = (
        f"{found.work.tokens:,} tokens a step in {found.time.total:.1f} s: {found.tokens_per_second:,.0f} tokens/s, "
        f"{each:,.0f} a GPU (MFU {found.model_flops_utilization:.0%}), bubble {found.bubble:.0%}"
    )
    if found.fits:
        return f"[green]fits[/]: {found.peak / GIB:.1f} of {found.usable / GIB:.1f} GiB; {speed}"
    worst = max(found.stages, key=lambda stage: stage.total)
    largest = max(ROWS, key=lambda name: getattr(worst, name))
    return (
        f"[red]does not fit[/]: {found.peak / GIB:.1f} of {found.usable / GIB:.1f} GiB, most of it {largest.replace('_', ' ')}, "
        f"{getattr(worst, largest) / GIB:.1f} GiB; if it did: {speed}"
    )


def proposal_table(proposals: Sequence[Estimate]) -> Table:
    table = Table()
    for name in ("split that fits, with ZeRO-1", "recompute", "GiB", "s a step", "tokens/s", "bubble"):
        table.add_column(name, justify="left" if name.startswith(("split", "recompute")) else "right")
    for one in proposals:
        recompute = one.config.parallel.recompute_granularity or "-"
        rest = f"{one.peak / GIB:.1f}", f"{one.time.total:.1f}", f"{one.tokens_per_second:,.0f}", f"{one.bubble:.0%}"
        table.add_row(one.mesh.describe(), recompute, *rest)
    return table


def assumptions(found: Estimate) -> list[str]:
    """What the figures rest on."""
    gpu, table = found.machines.gpu, efficiency
    lines = [
        f"{ASSUMED} ({found.work.length} tokens a sample, {found.work.positions} positions a pack)",
        f"of the peak of {gpu.bf16 / 1e12:.0f} TFLOP/s (bf16, dense): linear layers {table.LINEAR:.0%}, "
        f"attention {table.ATTENTION:.0%}, experts {table.EXPERTS:.0%}; of HBM {table.HBM:.0%}, of links {table.LINK:.0%}: "
        "those of tuned runs, see docs/planning.md",
        f"{RUNTIME / GIB:.0f} GiB of CUDA, NCCL and workspaces; {1 - USABLE:.0%} of {gpu.memory / GIB:.0f} GiB lost to fragments",
        f"hardware: {gpu.source}",
    ]
    if found.config.fp8.format is not None:
        each = copies(found.config.fp8, gpu.capability, trained=True)
        held = "in the place of bfloat16's" if found.config.fp8.param_gather else "beside those of bfloat16"
        lines.append(f"weights of layers in FP8 take {each:.3g} bytes a number, {held}; activations and traffic are bfloat16's")
    if found.mesh.ep > 1:
        load = table.imbalance(found.hf.num_experts, found.mesh.ep, table.Execution())
        lines.append(f"the fullest rank of experts has {load:.2f} times the mean of tokens, and nothing hides their exchange")
    if found.work.requests:
        engine = found.config.rollout.engine
        where = "in this process" if engine == "inprocess" else "on GPUs of its own, which are not among these"
        lines.append(f"all responses are as long as rollout.max_tokens; {engine} samples {where}")
    if found.config.data.kind == "rollouts":
        lines.append(f"{found.config.rollout.n} recorded rollouts for each prompt")
    return lines


def write_estimate(found: Estimate, proposals: Sequence[Estimate] | None, file: Path) -> None:
    """As JSON: bytes, seconds, tokens; proposals with the overrides that make them."""
    machines = found.machines
    tree = found.as_dict() | {
        "nodes": machines.nodes,
        "gpus_per_node": machines.gpus_per_node,
        "assumptions": assumptions(found),
        "proposals": [one.as_dict() | {"overrides": overrides(one.config.parallel)} for one in proposals or ()],
    }
    write_whole(file, json.dumps(tree, indent=2) + "\n")
