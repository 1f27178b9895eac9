"""What a run is going to do, before it does it."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from megapsft.config import Config
from megapsft.models.families import parameter_count
from megapsft.policy.backend import choose_backend
from megapsft.policy.build import padded_vocab_size
from megapsft.train.optimizer import learning_rate
from megapsft.train.plan import RunPlan, run_folder, to_yaml

UNITS = {  # of a step, by data.kind
    "demonstrations": "samples",
    "preferences": "pairs",
    "rollouts": "prompts with their rollouts",
    "prompts": "prompts",
}


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
    data = plan.data
    padded = padded_vocab_size(hf.vocab_size, config.model.make_vocab_size_divisible_by, mesh.tp)
    experts = f", {hf.num_experts} experts (top {hf.num_experts_per_tok})" if hf.num_experts else ""
    tokens = data.prompt_tokens + data.response_tokens
    samples = sum(len(group) for group in data.groups)
    unit = UNITS[config.data.kind]
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
        ("head", "{}: {}".format(*choose_backend(config.model.logprob_backend))),
        ("split", f"{mesh.world_size} process(es): {mesh.describe()}"),
        ("data", f"{len(data.groups):,} of {data.rows:,} rows ({data.dropped} dropped, {data.truncated} truncated)"),
        ("", f"{tokens:,} tokens, {data.response_tokens:,} of them trained; mean length {tokens / samples:.1f}"),
        ("steps", f"{steps}; {plan.updates_per_step} update(s) a step; {resumed}"),
        ("", f"{config.train.batch_size} {unit} a step, {plan.minibatch_size} an update, "
             f"{plan.steps * config.train.batch_size / len(data.groups):.2f} epochs"),
        ("rollouts", rollouts_text(config)) if config.data.kind == "prompts" else ("an update", update_text(plan)),
        ("learning rate", rates),
        *([("profile", profile_text(plan))] if config.profile.steps else []),
    ]  # fmt: skip


def update_text(plan: RunPlan) -> str:
    """How the first update is packed."""
    update = plan.first_update()
    positions = sum(len(micro.rows) * micro.length for share in update for micro in share)
    filled = sum(len(sample) for group in plan.first_groups() for sample in group) / positions
    longest = max(micro.length for share in update for micro in share)
    return (
        f"{len(update[0])} microbatches on each of {plan.mesh.dp} data-parallel rank(s), up to {longest} positions, "
        f"{filled:.1%} of {positions:,} positions filled"
    )


def profile_text(plan: RunPlan) -> str:
    """Which steps are watched, on which ranks, and where that goes."""
    profile = plan.config.profile
    first, last = profile.steps
    ranks = f"rank(s) {', '.join(map(str, profile.ranks))}" if profile.ranks else "all ranks"
    what = "ranges for nsys" if profile.tool == "nsys" else f"traces in {run_folder(plan.config) / 'profile'}"
    return f"steps {first} to {last} of {ranks}: {what}"


def rollouts_text(config: Config) -> str:
    """Who samples how many responses, and what they are rewarded for."""
    options = config.rollout
    where = "the policy itself" if options.engine == "inprocess" else f"SGLang, {len(options.urls) or options.servers} server(s)"
    rewards = " + ".join(f"{entry.get('weight', 1)} {entry.get('label') or entry['name']}" for entry in config.rewards)
    sizes = f"{options.n} responses to each prompt, up to {options.max_tokens} tokens, temperature {config.train.temperature}"
    return f"{sizes}, by {where}; reward: {rewards}"
