"""What a run is going to do, before it does it."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from megapsft.models.families import parameter_count
from megapsft.policy.build import padded_vocab_size
from megapsft.train.optimizer import learning_rate
from megapsft.train.plan import RunPlan, to_yaml


def show_plan(plan: RunPlan, whole: bool) -> None:
    """Print the plan; with `whole`, the resolved config as well."""
    console = Console()
    if whole:
        console.print(to_yaml(plan.config), highlight=False, markup=False)
    table = Table(show_header=False, title=f"{plan.config.run.dir}: {' then '.join(p.objective_name for p in plan.phases)}")
    table.add_column(style="bold")
    table.add_column()
    for name, text in plan_rows(plan):
        table.add_row(name, text)
    console.print(table)
    for note in plan.notes:
        console.print(f"[yellow]note:[/] {note}", highlight=False)


def plan_rows(plan: RunPlan) -> list[tuple[str, str]]:
    """(name, text) of everything that the plan knows."""
    config, hf, mesh = plan.config, plan.hf, plan.mesh
    data, update = plan.data, plan.first_update()
    padded = padded_vocab_size(hf.vocab_size, config.model.make_vocab_size_divisible_by, mesh.tp)
    experts = f", {hf.num_experts} experts (top {hf.num_experts_per_tok})" if hf.num_experts else ""
    tokens = data.prompt_tokens + data.response_tokens
    positions = sum(len(micro.rows) * micro.length for share in update for micro in share)
    filled = sum(len(sample) for group in plan.first_groups() for sample in group) / positions
    samples = sum(len(group) for group in data.groups)
    unit = {"demonstrations": "samples", "preferences": "pairs", "rollouts": "prompts with their rollouts"}[config.data.kind]
    longest = max(micro.length for share in update for micro in share)
    rates = ", ".join(
        f"{phase.name} {learning_rate(phase.optimizer, 0, phase.policy_steps):.3g} to "
        f"{learning_rate(phase.optimizer, phase.policy_steps - 1, phase.policy_steps):.3g}"
        for phase in plan.phases
    )
    steps = " + ".join(f"{phase.steps} of {phase.objective_name}" for phase in plan.phases)
    if config.critic.warmup_steps:
        steps += f" (the first {config.critic.warmup_steps} of the critic alone)"
    resumed = f"continues {plan.checkpoint}" if plan.checkpoint else "from the beginning"
    if plan.done_steps == plan.steps:
        resumed = "done: nothing is left to do (more train.steps would continue it)"
    return [
        ("model", f"{hf.architecture}, {parameter_count(hf):,} parameters, {hf.num_hidden_layers} layers{experts}"),
        ("", f"{config.model.dtype}, vocabulary {hf.vocab_size:,} padded to {padded:,}"),
        ("split", f"{mesh.world_size} process(es): {mesh.describe()}"),
        ("data", f"{len(data.groups):,} of {data.rows:,} rows ({data.dropped} dropped, {data.truncated} truncated)"),
        ("", f"{tokens:,} tokens, {data.response_tokens:,} of them trained; mean length {tokens / samples:.1f}"),
        ("steps", f"{steps}; {plan.updates_per_step} update(s) a step; {resumed}"),
        ("", f"{config.train.batch_size} {unit} a step, {plan.minibatch_size} an update, "
             f"{plan.steps * config.train.batch_size / len(data.groups):.2f} epochs"),
        ("an update", f"{len(update[0])} microbatches on each of {mesh.dp} data-parallel rank(s), up to {longest} positions, "
                      f"{filled:.1%} of {positions:,} positions filled"),
        ("learning rate", rates),
    ]  # fmt: skip
