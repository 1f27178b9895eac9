"""Everything about a run that can be known before a process starts: checked here, printed by --dry-run, then carried out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from megapsft.checkpoint.adapters import BASE, check_base, identity, merges_adapters
from megapsft.checkpoint.dist import check_architecture, latest, read_state, shape_of
from megapsft.checkpoint.hf import check_checkpoint, read_config
from megapsft.config import Config, CriticConfig, LoRAConfig, ReferenceConfig, TrainConfig, flatten, load_config, spelled, to_dict
from megapsft.data.cache import note_on_cache
from megapsft.data.chat_template import ChatTemplate
from megapsft.data.dataset import Dataset
from megapsft.data.plan import Layout, Plan, plan_update
from megapsft.data.prompts import Prompts
from megapsft.data.sampler import Sampler
from megapsft.errors import Refused
from megapsft.metrics.names import METRICS
from megapsft.models.families import family_of
from megapsft.models.family import Family
from megapsft.models.hf_config import HFConfig
from megapsft.objectives.registry import build_objective
from megapsft.parallel import Mesh, plan_mesh, with_overlap
from megapsft.platform.apex import note_on_apex
from megapsft.platform.cpu import has_cuda
from megapsft.platform.machine import layers_of, note_on_layers, this_machine
from megapsft.policy.backend import choose_backend
from megapsft.policy.build import model_shape
from megapsft.train.fp8 import alignment, check_fp8, note_on_fp8
from megapsft.train.noise_limit import check_limit, limit_of
from megapsft.train.phases import Phase, has_old_policy, phases, reference_needs
from megapsft.train.prepare import trained_groups, with_advantages
from megapsft.train.profile import check_profile, next_steps
from megapsft.train.rollout_options import OF_SGLANG, check_options, check_references
from megapsft.train.sources import Rows, load_dataset
from megapsft.train.tokens import check_tokens
from megapsft.types import Group, Objective

# what a continued run may change: how it is computed, kept and shown, never what is computed
MAY_CHANGE = (
    "parallel.",
    "log.",
    "profile.",
    "checkpoint.",
    "run.",
    "data.pack_length",
    "data.micro_batch_size",
    "data.packing",
    "data.cache",
    "model.logprob_chunk_bytes",
    "model.logprob_backend",
    "model.transformer_impl",
    "reference.placement",
    "model.make_vocab_size_divisible_by",
    "train.steps",
    "train.max_skipped_updates",
    "train.max_noise_clipped",
    "train.hang_",
    "evaluate.",
    *(f"rollout.{name}" for name in (*OF_SGLANG, "engine", "max_batch_size", "reward_workers")),
)
SFT_ON_PROMPTS = ("prompts", "warmup")  # has nothing to imitate


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    config: Config
    hf: HFConfig
    family: Family
    mesh: Mesh
    phases: tuple[Phase, ...]
    template: ChatTemplate
    data: Dataset
    sampler: Sampler
    checkpoint: Path | None  # to continue from
    base: str | None  # identity of the weights that adapters are trained beside; None: the weights are trained themselves
    notes: tuple[str, ...]  # what the user should know before it starts

    @property
    def rows(self) -> Rows:
        return Rows(self.data.groups, self.sampler)

    @property
    def steps(self) -> int:
        return self.phases[-1].end

    @property
    def done_steps(self) -> int:
        """Steps that the checkpoint to continue from has behind it."""
        return read_state(self.checkpoint)["step"] if self.checkpoint else 0

    @property
    def minibatch_size(self) -> int:
        return self.config.train.minibatch_size or self.config.train.batch_size

    @property
    def updates_per_step(self) -> int:
        return self.config.train.batch_size // self.minibatch_size

    @property
    def pinned_steps(self) -> frozenset[int]:
        """Steps whose checkpoints a resumed run needs again: where a phase begins whose start is its reference."""
        starts = {phase.first_step for phase in self.phases if self.needs_reference(phase)}
        return frozenset(starts - {0}) if self.config.reference.path is None else frozenset()

    def needs_reference(self, phase: Phase) -> bool:
        """Whether a frozen policy shares the process: not where the rows bring its log-probabilities."""
        precomputed = {"ref_logprobs"} if self.data.groups[0][0].ref_logprobs is not None else set()
        return bool(reference_needs(phase.objective) - precomputed)

    def layout(self, data_parallel_rank: int = 0, context_parallel_rank: int = 0) -> Layout:
        """How samples are packed for one rank."""
        return layout_of(self.config, self.mesh, data_parallel_rank, context_parallel_rank)

    def first_groups(self) -> list[Group]:
        """What the first update trains, as far as it is known: not what will be sampled."""
        return with_advantages(self.rows.next_groups(0), self.phases[0].objective)[: self.minibatch_size]

    def first_update(self) -> list[list[Plan]]:
        """The microbatches of the first update, by data-parallel rank."""
        groups = self.first_groups()
        together = 2 if self.config.data.kind == "preferences" else 1
        return plan_update([len(sample) for group in groups for sample in group], self.layout(), together)


def layout_of(config: Config, mesh: Mesh, data_parallel_rank: int = 0, context_parallel_rank: int = 0) -> Layout:
    """How samples are packed for one rank of the mesh."""
    data = config.data
    # pipelines pass on tensors of one shape; the allgather dispatcher collects equal parts of all its ranks
    gathers = mesh.ep > 1 and config.model.moe_token_dispatcher_type == "allgather"
    return Layout(
        packing=data.packing,
        pack_length=data.pack_length,
        micro_batch_size=data.micro_batch_size,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=mesh.dp,
        context_parallel_rank=context_parallel_rank,
        context_parallel_size=mesh.cp,
        tensor_parallel_size=mesh.tp,
        sequence_parallel=mesh.sequence_parallel,
        alignment=alignment(config.fp8),
        microbatch_multiple=mesh.pp if mesh.vpp > 1 else 1,  # Megatron's interleaved schedule
        equal_lengths=mesh.pp > 1 or gathers,
    )


def plan_run(config: Config, world_size: int) -> RunPlan:
    """Check everything that can be checked without a process group.

    Raises:
        Refused: whatever is wrong, by value, rule and remedy.
    """
    if not config.model.path:
        raise Refused("model.path=''", "names no model", "give a Hugging Face folder; `megapsft init-model` makes a small one")
    if not config.data.path:
        raise Refused("data.path=''", "names no data", "give a .jsonl or .parquet file of prompts and demonstrations")
    if not config.run.dir:
        raise Refused("run.dir=''", "names no folder", "give one such as runs/first")
    if config.checkpoint.keep_best and config.checkpoint.best_metric not in METRICS:
        remedy = "use one of " + ", ".join(METRICS)
        raise Refused(f"checkpoint.best_metric={config.checkpoint.best_metric}", "is not a metric", remedy)
    train = config.train
    check_minibatch(train)
    all_phases = phases(config)
    config = _with_all_options(config)
    hf = read_config(config.model.path)
    family = family_of(hf)
    mesh = plan_mesh(config.parallel, world_size, model_shape(hf), has_cuda(), config.model.moe_token_dispatcher_type)
    if config.data.max_length > hf.max_position_embeddings:
        raise Refused(
            f"data.max_length={config.data.max_length}",
            f"exceeds max_position_embeddings={hf.max_position_embeddings} of {config.model.path}",
            f"use data.max_length={hf.max_position_embeddings} or less",
        )
    weights = check_checkpoint(config.model.path, family, hf).weights
    layers_of(config.model, this_machine())
    compares = any(reference_needs(phase.objective) for phase in all_phases)
    check_fp8(config, hf, mesh, this_machine(), compares)
    check_adapters(config, mesh, hf, all_phases[-1].objective)
    choose_backend(config.model.logprob_backend)
    _check_other_models(config, all_phases, hf)
    check_limit(config, all_phases[-1].objective)
    swapped = compares and config.reference.placement == "swap"
    config = dataclasses.replace(config, parallel=with_overlap(config.parallel, has_cuda(), swapped))
    check_options(config)
    check_tokens(config.log)
    check_profile(config.profile, all_phases[-1].end, world_size)
    template = ChatTemplate.load(config.model.path)
    data = load_dataset(config, template, hf.vocab_size)
    _check_data(config, all_phases, data)
    if isinstance(data, Prompts):
        check_references(config, data)
    plan = RunPlan(
        config=config,
        hf=hf,
        family=family,
        mesh=mesh,
        phases=all_phases,
        template=template,
        data=data,
        sampler=Sampler(len(data.groups), train.batch_size, train.seed, config.data.shuffle),
        checkpoint=latest(checkpoint_folder(config)),
        base=identity(weights) if config.lora.rank is not None else None,
        notes=(),
    )
    if plan.checkpoint is not None:
        state = read_state(plan.checkpoint)
        check_architecture(plan.checkpoint, state, hf)
        _check_continues(plan)
        if merges_adapters(state) != (plan.base is not None):  # without the run's config.yaml nothing else has said so
            held = "adapters alone" if merges_adapters(state) else "a whole model"
            rule = f"does not fit {plan.checkpoint}, which holds {held}"
            remedy = "give the lora.* it was started with, or choose another run.dir"
            raise Refused(f"lora.rank={spelled(config.lora.rank)}", rule, remedy)
        if plan.base is not None:
            check_base(plan.base, state[BASE], Path(config.model.path), plan.checkpoint)
    return _with_notes(plan)


def with_profile(plan: RunPlan) -> RunPlan:
    """The plan with `profile.steps`: those that it says, or of the steps to come the second and third."""
    if plan.config.profile.steps is not None:
        return plan
    profile = dataclasses.replace(plan.config.profile, steps=next_steps(plan.done_steps, plan.steps))
    return dataclasses.replace(plan, config=dataclasses.replace(plan.config, profile=profile))


def check_minibatch(train: TrainConfig) -> None:
    """Refuse a minibatch that does not divide the batch of a step."""
    minibatch = train.minibatch_size or train.batch_size
    if train.batch_size % minibatch:
        raise Refused(
            f"train.minibatch_size={minibatch}",
            f"must divide train.batch_size={train.batch_size}",
            f"use {_nearest_divisor(train.batch_size, minibatch)}",
        )


def _check_other_models(config: Config, all_phases: Sequence[Phase], hf: HFConfig) -> None:
    """Refuse options of a reference, a critic or experts where there are none, and folders that do not fit the policy."""
    name = all_phases[-1].objective_name
    objective = all_phases[-1].objective
    compares = bool(reference_needs(objective))
    used = {"reference": compares, "critic": objective.critic}
    for section, default in (("reference", ReferenceConfig()), ("critic", CriticConfig())):
        for field in dataclasses.fields(default):
            value = getattr(getattr(config, section), field.name)
            if value != getattr(default, field.name) and not used[section]:
                rule = f"says something of a {section}, but objective.name={name} has none with these options"
                raise Refused(f"{section}.{field.name}={value}", rule, f"leave {section} out, or choose another objective")
        path = getattr(config, section).path
        if path is not None:
            other = read_config(path)
            if shape_of(other) != shape_of(hf):
                rule = f"is of another architecture than {config.model.path}"
                raise Refused(f"{section}.path={path}", rule, "name one like it")
            check_checkpoint(path, family_of(other), other)
    if config.critic.warmup_steps >= config.train.steps:
        rule = f"leaves the policy none of train.steps={config.train.steps}"
        raise Refused(f"critic.warmup_steps={config.critic.warmup_steps}", rule, "use fewer, or more train.steps")
    if compares and config.reference.placement == "swap" and config.parallel.overlap_param_gather:
        rule = "exchanges weights that parallel.overlap_param_gather=true may still be gathering"
        raise Refused("reference.placement=swap", rule, "use reference.placement=copy, or overlap_param_gather=false")
    for key in ("moe_aux_loss_coeff", "moe_routing_replay"):
        if getattr(config.model, key) and not hf.num_experts:
            rule = f"is of experts, and {hf.architecture} has none"
            raise Refused(f"model.{key}={getattr(config.model, key)}", rule, "leave it out")
    if config.model.moe_routing_replay and not has_old_policy(objective):
        rule = f"gives policy and old policy the same experts, and objective.name={name} has no old policy"
        value = f"model.moe_routing_replay={str(config.model.moe_routing_replay).lower()}"
        raise Refused(value, rule, "leave it out, or choose an objective with a ratio")


def check_adapters(config: Config, mesh: Mesh, hf: HFConfig, objective: Objective) -> None:
    """Refuse adapters that cannot be split or that nothing is trained of, with a critic or another reference; options of none."""
    lora, default = config.lora, LoRAConfig()
    if lora.rank is None:
        for field in ("alpha", "target_modules"):
            if getattr(lora, field) != getattr(default, field):
                rule = "says something of adapters, but lora.rank=null has none"
                raise Refused(f"lora.{field}={spelled(getattr(lora, field))}", rule, "set lora.rank, such as 16, or leave it out")
        return
    if len(set(lora.target_modules)) < max(1, len(lora.target_modules)):
        rule = "names none" if not lora.target_modules else "names one twice"
        known = ", ".join(default.target_modules)
        raise Refused(f"lora.target_modules={spelled(lora.target_modules)}", rule, f"use some of {known}")
    sizes = {"tensor_model_parallel_size": mesh.tp, "expert_tensor_parallel_size": mesh.etp if hf.num_experts else 1}
    for name, size in sizes.items():
        if lora.rank % size:
            rule = f"is not divided by parallel.{name}={size}, which splits A and B"
            raise Refused(f"lora.rank={lora.rank}", rule, f"use lora.rank={-(-lora.rank // size) * size}")
    if family_of(hf).carried is not None:
        rule = f"is not for {hf.architecture}, whose modules PEFT calls otherwise than its files do"
        raise Refused(f"lora.rank={lora.rank}", rule, "train all weights (lora.rank=null), or a model of text alone")
    if config.fp8.param_gather:
        rule = "holds the weights that are trained in FP8, and with lora.rank adapters are trained, in bfloat16"
        raise Refused("fp8.param_gather=true", rule, "leave it out")
    if config.fp8.format is not None and config.fp8.recipe == "delayed":
        rule = "has scales of earlier passes, which checkpoints of adapters do not keep"
        raise Refused("fp8.recipe=delayed", rule, "use fp8.recipe=tensorwise, or lora.rank=null")
    if objective.critic:
        rule = f"trains adapters, and objective.name={config.objective['name']} a critic, of which all weights are trained"
        raise Refused(f"lora.rank={lora.rank}", rule, "use an objective without one, such as grpo, or lora.rank=null")
    if config.reference.path is not None:
        rule = "is another model, and with lora.rank the reference is this one with its adapters as they were"
        raise Refused(f"reference.path={config.reference.path}", rule, "leave it out, or train all weights (lora.rank=null)")


def _check_data(config: Config, all_phases: Sequence[Phase], data: Dataset) -> None:
    """Refuse rows that an objective cannot be trained on."""
    kind, first = config.data.kind, data.groups[0][0]
    for phase in all_phases:
        trained = "rollouts" if kind == "prompts" else kind
        if trained not in phase.objective.trains_on or (kind, phase.name) == SFT_ON_PROMPTS:
            rule = f"is not what {phase.objective_name} trains on"
            if phase.name == "warmup":
                rule += f" (train.sft_warmup_steps={config.train.sft_warmup_steps})"
            known = ", ".join(sorted(phase.objective.trains_on))
            raise Refused(f"data.kind={kind}", rule, f"use data.kind={known}, or another objective")
        if kind == "prompts":
            continue
        if not any(trained_groups(data.groups, phase.objective)):
            rule = f"hold nothing that {phase.objective_name} trains, such as rollouts beside their demonstration"
            raise Refused(f"{len(data.groups)} rows of {config.data.path}", rule, "use other rows, or another objective")
        if "rollout_logprobs" in phase.objective.needs and first.rollout_logprobs is None:
            rule = f"have no logprobs of the engine that sampled them, which objective.tis={config.objective.get('tis')} needs"
            remedy = "record them, or set objective.tis=off; they are never made up"
            raise Refused(f"rollouts of {config.data.path}", rule, remedy)
    if kind == "preferences" and not config.data.packing and config.data.micro_batch_size % 2:
        rule = "cannot hold the two sides of a preference"
        raise Refused(f"data.micro_batch_size={config.data.micro_batch_size}", rule, "use a multiple of 2, or data.packing=true")


def _with_all_options(config: Config) -> Config:
    """The config with the objective's own defaults filled in, so that what a run records does not depend on them."""
    options = dataclasses.asdict(build_objective(config.objective))
    return dataclasses.replace(config, objective={"name": config.objective["name"], **options})


def run_folder(config: Config) -> Path:
    return Path(config.run.dir)


def checkpoint_folder(config: Config) -> Path:
    return run_folder(config) / "checkpoints"


def config_file(config: Config) -> Path:
    """Where the resolved config lies beside the run."""
    return run_folder(config) / "config.yaml"


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(_plain(to_dict(config)), sort_keys=False)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _check_continues(plan: RunPlan) -> None:
    """Refuse to continue a run under a config that would make it another one."""
    file = config_file(plan.config)
    if not file.is_file():
        return
    before, now = flatten(_with_all_options(load_config(file))), flatten(plan.config)
    for key in sorted(set(before) | set(now), key=lambda key: (key != "objective.name", key)):  # its options follow from it
        if before.get(key) == now.get(key) or key.startswith(MAY_CHANGE):
            continue
        if key == "model.path" and plan.base is not None:
            continue  # of what adapters are beside: it may have moved, and its weights are compared
        raise Refused(
            f"{key}={spelled(now.get(key))}",
            f"differs from the {spelled(before.get(key))} that {plan.config.run.dir} was started with",
            "choose another run.dir, or give the old value to continue",
        )
    decays = plan.config.optimizer.lr_decay_style != "constant"
    if decays and before["train.steps"] != now["train.steps"]:
        raise Refused(
            f"train.steps={now['train.steps']}",
            f"would bend the {plan.config.optimizer.lr_decay_style} schedule that was started with {before['train.steps']}",
            "choose another run.dir, or lr_decay_style=constant from the start",
        )


def _with_notes(plan: RunPlan) -> RunPlan:
    possible = (
        note_on_layers(plan.config.model, this_machine()),
        note_on_apex(),
        note_on_fp8(plan.config.fp8),
        note_on_cache(plan.config.data, plan.data.rows, plan.mesh.world_size),
    )
    notes = [note for note in possible if note is not None]
    objective = plan.phases[-1]
    name, train = objective.objective_name, plan.config.train
    if has_old_policy(objective.objective) and plan.updates_per_step == 1:
        then = "nothing clips" if objective.objective.advantages else f"nothing clips: {name} is sft by construction"
        notes.append(
            f"{name} with one update a step: the old policy is the policy, every ratio is 1 and {then}. Set "
            f"train.minibatch_size below train.batch_size={train.batch_size} (the paper: an eighth)."
        )
    limit = limit_of(plan.config, objective.objective)
    if limit is not None and plan.done_steps == 0:
        notes.append(
            f"Before the first update the noise of the ratio is measured: the run is refused where it alone clips more than "
            f"{100 * limit:g} % (train.max_noise_clipped)."
        )
    if plan.family.carried is not None:
        beside = f"{plan.family.carried}* is not loaded, and exported as it came"
        notes.append(f"{plan.hf.architecture}: text alone is trained; {beside}.")
    notes.extend(plan.data.notes)
    sampled = plan.config.data.kind in ("rollouts", "prompts")
    if sampled and objective.objective.advantages is None and plan.config.data.select is None:
        notes.append(f"{name} reads no rewards: it imitates wrong rollouts too; data.select=rft trains on right ones alone.")
    where = plan.config.reference.placement
    if plan.needs_reference(objective):
        kept = "its weights are kept in host memory and swapped in" if where == "swap" else "a second model on the device"
        notes.append(f"{name} compares with a frozen reference in the same process: {kept} (reference.placement={where}).")
    if plan.data.dropped or plan.data.truncated:
        notes.append(
            f"{plan.data.dropped} of {plan.data.rows} rows dropped and {plan.data.truncated} truncated: "
            f"longer than data.max_length={plan.config.data.max_length}, or as the notes on the data say."
        )
    if train.batch_size > len(plan.data.groups):
        notes.append(f"train.batch_size exceeds the {len(plan.data.groups)} rows: a step repeats some of them.")
    return dataclasses.replace(plan, notes=tuple(notes))


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((n for n in range(1, number + 1) if number % n == 0), key=lambda n: abs(n - wanted))
