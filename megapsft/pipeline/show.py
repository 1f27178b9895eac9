"""What a pipeline is going to do, before it does it."""

from __future__ import annotations

from rich.console import Console

from megapsft.pipeline.config import differences
from megapsft.pipeline.plan import PipelinePlan


def show_pipeline(plan: PipelinePlan) -> None:
    """Print each stage: its state, what it starts from, and every key that differs from its file."""
    lines = [f"{plan.folder}: {plan.config.model}" + "".join(f" -> {stage.name}" for stage in plan.stages)]
    for stage, given in zip(plan.stages, plan.config.stages, strict=True):
        lines.append(f"{stage.name}: {given.config}, {stage.state}")
        lines += [f"    {key}={value!r} (not {before!r})" for key, value, before in differences(stage.config, given)]
    compared = ", ".join(f"{task.benchmark.name} ({len(task.benchmark.problems)} problems x {task.n})" for task in plan.tasks)
    lines.append(f"compared: {compared}" if compared else "compared: nothing, for compare.data names no file")
    console = Console(width=10_000)  # never wrapped
    console.print("\n".join(lines), highlight=False, markup=False)
