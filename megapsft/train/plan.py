"""Everything about a run that can be known before a process starts: checked here, printed by --dry-run, then carried out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import yaml

from megapsft.checkpoint.dist import check_architecture, latest, read_state
from megapsft.checkpoint.hf import check_checkpoint, read_config
from megapsft.config import Config, flatten, load_config, to_dict
from megapsft.data.chat_template import ChatTemplate
from megapsft.data.demonstrations import Demonstrations, load_demonstrations
from megapsft.data.plan import Layout, Plan, plan_update
from megapsft.data.sampler import Sampler
from megapsft.errors import Refused
from megapsft.metrics.names import METRICS
from megapsft.models.families import family_of
from megapsft.models.family import Family
from megapsft.models.hf_config import HFConfig
from megapsft.objectives.registry import build_objective
from megapsft.parallel import Mesh, plan_mesh
from megapsft.platform.cpu import has_cuda
from megapsft.policy.build import model_shape
from megapsft.train.phases import Phase, phases
from megapsft.train.sources import DemonstrationSource

# what a continued run may change: how it is computed, kept and shown, never what is computed
MAY_CHANGE = (
    "parallel.",
    "log.",
    "checkpoint.",
    "run.",
    "data.pack_length",
    "data.micro_batch_size",
    "data.packing",
    "model.logprob_chunk_bytes",
    "model.make_vocab_size_divisible_by",
    "train.steps",
    "train.max_skipped_updates",
)


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    config: Config
    hf: HFConfig
    family: Family
    mesh: Mesh
    phases: tuple[Phase, ...]
    template: ChatTemplate
    source: DemonstrationSource
    checkpoint: Path | None  # to continue from
    notes: tuple[str, ...]  # what the user should know before it starts

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
    def demonstrations(self) -> Demonstrations:
        return self.source.demonstrations

    def layout(self, data_parallel_rank: int = 0, context_parallel_rank: int = 0) -> Layout:
        """How samples are packed for one rank."""
        mesh, data = self.mesh, self.config.data
        # pipelines pass on tensors of one shape; the allgather dispatcher collects equal parts of all its ranks
        gathers = mesh.ep > 1 and self.config.model.moe_token_dispatcher_type == "allgather"
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
            microbatch_multiple=mesh.pp if mesh.vpp > 1 else 1,  # Megatron's interleaved schedule
            equal_lengths=mesh.pp > 1 or gathers,
        )

    def first_update(self) -> list[list[Plan]]:
        """The microbatches of the first update, by data-parallel rank."""
        samples = self.source.next_samples(0)[: self.minibatch_size]
        return plan_update([len(sample) for sample in samples], self.layout())


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
    minibatch = train.minibatch_size or train.batch_size
    if train.batch_size % minibatch:
        raise Refused(
            f"train.minibatch_size={minibatch}",
            f"must divide train.batch_size={train.batch_size}",
            f"use {_nearest_divisor(train.batch_size, minibatch)}",
        )
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
    check_checkpoint(config.model.path, family, hf)
    template = ChatTemplate.load(config.model.path)
    demonstrations = load_demonstrations(config.data, template, hf.vocab_size)
    sampler = Sampler(len(demonstrations.samples), train.batch_size, train.seed, config.data.shuffle)
    plan = RunPlan(
        config=config,
        hf=hf,
        family=family,
        mesh=mesh,
        phases=all_phases,
        template=template,
        source=DemonstrationSource(demonstrations, sampler),
        checkpoint=latest(checkpoint_folder(config)),
        notes=(),
    )
    if plan.checkpoint is not None:
        check_architecture(plan.checkpoint, read_state(plan.checkpoint), hf)
        _check_continues(plan)
    return _with_notes(plan)


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
        raise Refused(
            f"{key}={now.get(key)!r}",
            f"differs from the {before.get(key)!r} that {plan.config.run.dir} was started with",
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
    notes: list[str] = []
    objective = plan.phases[-1]
    if "old_logprobs" in objective.objective.needs and plan.updates_per_step == 1:
        notes.append(
            f"{objective.objective_name} with one update a step is sft by construction: the old policy is the policy, every "
            f"ratio is 1 and nothing clips. Set train.minibatch_size below train.batch_size={plan.config.train.batch_size} "
            f"(the paper: an eighth)."
        )
    demonstrations = plan.demonstrations
    if demonstrations.dropped or demonstrations.truncated:
        notes.append(
            f"{demonstrations.dropped} of {demonstrations.rows} rows dropped and {demonstrations.truncated} truncated: "
            f"longer than data.max_length={plan.config.data.max_length}."
        )
    if plan.config.train.batch_size > len(demonstrations.samples):
        notes.append(f"train.batch_size exceeds the {len(demonstrations.samples)} samples: a step repeats some of them.")
    return dataclasses.replace(plan, notes=tuple(notes))


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((n for n in range(1, number + 1) if number % n == 0), key=lambda n: abs(n - wanted))
