"""A run in progress on this rank: what the loop works with, and where it stands."""

from __future__ import annotations

import dataclasses
import fcntl
import math
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megapsft import __version__
from megapsft.checkpoint.adapters import BASE, keep_adapter_config
from megapsft.checkpoint.dist import Checkpoints, Trained, load_model, read_state
from megapsft.checkpoint.hf import import_hf, init_adapters
from megapsft.checkpoint.hf_save import keep_model
from megapsft.checkpoint.together import from_first
from megapsft.config import flatten
from megapsft.data.pack import pack
from megapsft.data.prompts import Prompts
from megapsft.errors import Refused, TrainingStopped
from megapsft.metrics.sinks import Sinks, TensorBoard, WandB
from megapsft.platform.chips import TFLOPS, bf16_peak, driver_name
from megapsft.platform.clock import Clock, part
from megapsft.platform.hang import HangWatch, Heartbeat
from megapsft.platform.memory import memory_of_fullest_rank
from megapsft.policy.backend import choose_backend, working_backend
from megapsft.policy.build import Policy, build_chunks, distribute, half, transformer_config
from megapsft.policy.critic import with_value_heads
from megapsft.policy.lora import with_adapters
from megapsft.policy.reference import Copied, Reference, Swapped
from megapsft.train.critic import Critic
from megapsft.train.engines import open_engine
from megapsft.train.gate import gather_evidence
from megapsft.train.noise_limit import limit_of
from megapsft.train.optimizer import build_optimizer, forget, learning_rate
from megapsft.train.phases import Phase, phase_of
from megapsft.train.plan import RunPlan, checkpoint_folder, config_file, run_folder, to_yaml
from megapsft.train.profile import Profile
from megapsft.train.sampled import Sampled
from megapsft.train.sources import Rows, Source
from megapsft.train.stop import Stop, go_on
from megapsft.train.update import Report
from megapsft.train.watch import Watch
from megapsft.types import Group, Objective, TrainBatch


@dataclass
class Progressed:
    """How far the run is; saved with every checkpoint."""

    step: int = 0  # steps done
    update: int = 0  # updates done, skipped ones included
    skipped_updates: int = 0
    skipped_in_a_row: int = 0
    trained_tokens: int = 0
    drawn: int = 0  # of the stream of prompts, where responses to them are sampled
    waiting: list[int] = field(default_factory=list)  # draws that were aborted, and come first in the next step
    held: list[int] = field(default_factory=list)  # draws whose demonstrations wait in rollout.demonstration_buffer
    noise_clipped: float | None = None  # share of ratios, measured once; None: not yet, or nobody asked


class Evaluation(Protocol):
    """What answers benchmarks with the policy as it is."""

    def __call__(self, run: Run) -> dict[str, float]:
        """The metrics, `evaluate/...`, on the first rank. Collective."""

    def close(self) -> None:
        """End what it started."""


@dataclass
class Run:
    plan: RunPlan
    policy: Policy
    optimizer: ChainedOptimizer
    checkpoints: Checkpoints
    source: Source
    sinks: Sinks | None  # on the first rank only
    progress: Progress | None  # on the first rank only
    done: Progressed = field(default_factory=Progressed)
    reports: list[dict[str, float]] = field(default_factory=list)  # of the step's updates
    since_checkpoint: list[float] = field(default_factory=list)  # `checkpoint.best_metric` of the steps since the last one
    reference: Reference | None = None  # frozen; of the present phase, where its objective compares with one
    critic: Critic | None = None  # of the present phase, where its objective has one
    watch: Watch = field(default_factory=Watch)
    evaluation: Evaluation | None = None  # of benchmarks, where evaluate.data names some
    lock: IO | None = None  # held while the run lives, on the first rank
    stop: Stop | None = None  # what may ask it to stop
    stopped: str | None = None  # why it ends after this step
    heart: Heartbeat = field(default_factory=Heartbeat)
    hang: HangWatch | None = None
    parts: Clock = field(default_factory=Clock)  # of the step
    profile: Profile | None = None
    peak_flops: float | None = None  # FLOP/s of a device, where they are known
    clock: float = field(default_factory=time.perf_counter)

    def steps(self) -> Iterator[int]:
        """The steps still to do, until the run is stopped."""
        if self.evaluation is not None and not from_first(lambda: self.sinks.evaluated(self.done.step)):
            self.evaluate_if_due(self.done.step - 1)  # before the first step, or where a stop came before the benchmarks
        self.clock = time.perf_counter()
        for step in range(self.done.step, self.plan.steps):
            with self.profile.step(step + 1) if self.profile else nullcontext():
                yield step
            if self.profile and self.profile.ends_with(step + 1):
                self._write_profile()
            if self.stopped:
                break

    def enter(self, step: int) -> Phase:
        """The phase of `step`; where it begins, the optimizer starts afresh, and the reference becomes what the policy is."""
        phase = phase_of(self.plan.phases, step)
        if step == phase.first_step:
            self.heart.forget()
            forget(self.optimizer)
            if self.plan.needs_reference(phase):
                self.reference = build_reference(self.plan, self.policy)
        if phase.objective.critic and self.critic is None:
            self.critic = build_critic(self.plan)
        self.heart.begin()
        return phase

    def refuse_noise(self, groups: list[Group]) -> None:
        """Collective. Once, before the first update: a run that would clip more noise than it may ends here, with nothing made.

        Raises:
            Refused: as `Evidence.refuse`.
        """
        limit = limit_of(self.plan.config, self.plan.phases[-1].objective)
        if limit is None or self.done.noise_clipped is not None:
            return
        with self._uncounted():
            evidence = gather_evidence(self.policy, self.plan, groups[: self.plan.minibatch_size], limit)
        if evidence is None:
            return
        self.done.noise_clipped = evidence.floor.clipped
        if self.sinks:
            evidence.write(run_folder(self.plan.config))
        if not evidence.accepted:
            self.close()
            evidence.refuse()
        self.say(f"Noise: {evidence}; train.max_noise_clipped={limit:g} allows that.")

    def pack(self, groups: list[Group], objective: Objective) -> TrainBatch:
        """This rank's part of the step, cut into the minibatches of its updates."""
        ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_context_parallel_rank()
        with part("data"):
            return pack(
                groups,
                minibatch_size=self.plan.minibatch_size,
                layout=self.plan.layout(*ranks),
                aggregation=objective.aggregation,
                max_response_length=objective.max_response_length,
                pad_token_id=self.plan.template.pad_token_id,
                together=self.plan.config.data.kind == "preferences",
                context_group=parallel_state.get_context_parallel_group() if self.plan.mesh.cp > 1 else None,
            )

    def learning_rate(self, step: int, phase: Phase) -> float | None:
        """Of the policy, whose schedule begins with its first update; None before, where the critic alone is trained."""
        if step < phase.policy_from:
            return None
        return learning_rate(phase.optimizer, step - phase.policy_from, phase.policy_steps)

    def log_update(self, step: int, phase: Phase, report: Report) -> None:
        """Count, write and show one update.

        Raises:
            TrainingStopped: train.max_skipped_updates in a row were skipped.
        """
        now, seconds = time.perf_counter(), time.perf_counter() - self.clock
        self.clock = now
        self.heart.beat()
        done = self.done
        done.update += 1
        done.trained_tokens += int(report.metrics["data/trained_tokens"])
        done.skipped_updates += report.skipped is not None
        done.skipped_in_a_row = done.skipped_in_a_row + 1 if report.skipped else 0
        metrics = report.metrics | {
            "train/skipped_updates": done.skipped_updates,
            "perf/seconds": seconds,
        }
        metrics |= self._speed(metrics)
        self.reports.append(metrics)
        if self.sinks:
            self.sinks.write_update(self._record(step, phase) | metrics)
        if self.progress:
            self._show(phase, metrics, report.skipped)
        if step >= phase.policy_from:
            self.say(self.watch.update(done.update, metrics))
        if done.skipped_in_a_row >= self.plan.config.train.max_skipped_updates:
            raise TrainingStopped(
                f"{done.skipped_in_a_row} updates in a row were skipped (train.max_skipped_updates="
                f"{self.plan.config.train.max_skipped_updates}); last: {report.skipped}. Lower optimizer.lr, check the data "
                f"and model.path for values that are not finite; the last checkpoint is untouched."
            )

    def log_step(self, step: int, phase: Phase) -> None:
        """Collective. Write the step's own record: token means of its updates, and the entropy of the policy at its start."""
        reports, self.reports = self.reports, []
        self.heart.end()
        self.done.step = step + 1
        if self.progress:
            self.progress.update(self.progress.task_ids[0], completed=step + 1)
        for name, value in self.source.state().items():
            setattr(self.done, name, value)
        if not reports:
            kind = self.plan.config.data.kind
            self.say(f"step {step + 1}: {phase.objective_name} trains none of its {kind}; nothing was updated.")
            if self.sinks and self.source.metrics:
                self.sinks.write_step(self._record(step, phase) | dict(self.source.metrics))
            return
        tokens = sum(r["data/trained_tokens"] for r in reports)
        record: dict[str, float] = {}
        for key in reports[0]:
            values = [r[key] for r in reports]
            if key.startswith("data/") or key in ("perf/seconds", "perf/model_flops"):
                record[key] = sum(values)
            elif key.endswith(("_max", "/max")):
                record[key] = max(values)
            elif key.endswith(("_min", "/min")):
                record[key] = min(values)
            elif key.endswith("grad_norm"):
                record[key] = sum(values) / len(values)
            elif key in ("train/lr", "train/skipped_updates"):
                record[key] = values[-1]
            else:
                weighted = sum(v * r["data/trained_tokens"] for v, r in zip(values, reports, strict=True))
                record[key] = weighted / tokens if tokens else 0.0
        record |= self._speed(record)
        record["perf/memory_bytes"] = float(memory_of_fullest_rank(self.policy.device))
        record |= self.source.metrics
        record |= {f"perf/{name}_seconds": seconds for name, seconds in self.parts.take().items()}
        best = record.get(self.plan.config.checkpoint.best_metric)
        if best is not None and math.isfinite(best) and step >= phase.policy_from:  # before, the policy was not trained
            self.since_checkpoint.append(best)
        if self.sinks:
            self.sinks.write_step(self._record(step, phase) | {"epoch": self.source.epoch(step + 1)} | record)
        if step >= phase.policy_from:
            self.say(self.watch.step(phase, record, len(reports)))
        with part("checkpoint"):
            self.checkpoints.finish(blocking=False)

    def say(self, text: str | None) -> None:
        """A note for the user, above the bar of progress where there is one."""
        if text and self.sinks:
            console = self.progress.console if self.progress else Console(stderr=True)
            console.print(f"[yellow]note:[/] {text}", highlight=False)

    def stop_if_asked(self, step: int) -> None:
        """Collective. Whether the run ends after this step: it was asked to, and there is more to do."""
        reason = self.stop.asked(self.policy.device) if self.stop else None
        if step + 1 < self.plan.steps or self._evaluation_due(step + 1):
            self.stopped = reason

    def evaluate_if_due(self, step: int) -> None:
        """Answer the benchmarks before the first step, every `evaluate.interval` steps, and after the last. Collective.

        Where the run is stopped they wait until it goes on.
        """
        done = step + 1
        if self.stopped or not self._evaluation_due(done):
            return
        self.heart.rest()
        with self._uncounted(), part("evaluate"):
            metrics = self.evaluation(self)
        if self.sinks:
            self.sinks.write_evaluation({"update": self.done.update, "step": done} | metrics)
            found = (f"{key.removeprefix('evaluate/')} {value:.4g}" for key, value in metrics.items())
            self.say(f"step {done}: {', '.join(found)}")

    def save_if_due(self, step: int, phase: Phase) -> None:
        """A checkpoint every `checkpoint.interval` steps, at the end of a phase, and at the end of the run, stopped or not."""
        interval = self.plan.config.checkpoint.interval
        if not (self.stopped or step + 1 == phase.end or (interval and (step + 1) % interval == 0)):
            return
        self.heart.rest()
        score = sum(self.since_checkpoint) / len(self.since_checkpoint) if self.since_checkpoint else None
        self.since_checkpoint = []
        state = dataclasses.asdict(self.done) | ({BASE: self.plan.base} if self.plan.base else {})
        with part("checkpoint"):
            self.checkpoints.save(step + 1, state, self.models(), score)

    def models(self) -> dict[str, Trained]:
        """What is trained, by the prefix of its keys in checkpoints."""
        models = {"": Trained(self.policy, self.optimizer)}
        if self.critic:
            models["critic."] = Trained(self.critic.policy, self.critic.optimizer)
        return models

    def close(self) -> None:
        """Collective. Wait for the last checkpoint, end what was started, close what writes."""
        if self.hang:
            self.hang.close()
        with part("checkpoint"):
            self.checkpoints.finish()  # first: where the run was asked to stop, time is short
        if self.profile:
            self.profile.finish()
        if self.evaluation is not None:
            self.evaluation.close()
        self.source.close()
        if self.progress:
            self.progress.stop()
        if self.sinks:
            self.sinks.close()
            self.stop.settle(self.done.step, self.stopped)

    def _write_profile(self) -> None:
        self.heart.rest()
        with self._uncounted():
            self.profile.finish()
        if self.plan.config.profile.tool == "torch":
            self.say(f"traces are in {run_folder(self.plan.config) / 'profile'}")

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        """The body is in the time of no update: what went by before it still is."""
        began = time.perf_counter()
        yield
        self.clock += time.perf_counter() - began

    def _speed(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """How much went through in the seconds of an update, or of a step."""
        seconds = metrics["perf/seconds"]
        flops = metrics["perf/model_flops"] / seconds / self.plan.mesh.world_size
        found = {"perf/tokens_per_second": metrics["data/real_tokens"] / seconds, "perf/tflops_per_device": flops / TFLOPS}
        return found | ({"perf/mfu": flops / self.peak_flops} if self.peak_flops else {})

    def _evaluation_due(self, done: int) -> bool:
        return self.evaluation is not None and (done % self.plan.config.evaluate.interval == 0 or done == self.plan.steps)

    def _record(self, step: int, phase: Phase) -> dict[str, Any]:
        name = phase.name if step >= phase.policy_from else "critic"
        return {"update": self.done.update, "step": step + 1, "phase": name, "objective": phase.objective_name}

    def _show(self, phase: Phase, metrics: dict[str, float], skipped: str | None) -> None:
        if skipped:
            self.progress.console.print(f"[yellow]update {self.done.update} skipped: {skipped}")
        text = (
            f"nll {metrics['objective/nll']:.3f}  entropy {metrics['policy/entropy']:.3f}  "
            f"clip {metrics['objective/clip_fraction']:.3f}  {metrics['perf/tokens_per_second']:,.0f} tok/s"
        )
        if "reward/mean" in metrics:
            text = f"reward {metrics['reward/mean']:.3f}  {text}"
        self.progress.update(self.progress.task_ids[0], description=phase.objective_name, text=text)


def start(plan: RunPlan, evaluation: Evaluation | None = None, signalled: Callable[[], bool] = lambda: False) -> Run:
    """Collective. Build the policy and its optimizer, fill them from the checkpoint or the Hugging Face folder, open sinks.

    Args:
        signalled: whether this rank was sent a signal that asks the run to stop.
    """
    config, first = plan.config, dist.get_rank() == 0
    stop = Stop(run_folder(config), config.run.stop_after, signalled)
    lock = _lock(run_folder(config)) if first else None
    if first:
        go_on(run_folder(config))
    policy = build_policy(plan)
    optimizer = build_optimizer(config.optimizer, config.parallel, policy)
    checkpoints = Checkpoints(checkpoint_folder(config), config.checkpoint, plan.pinned_steps)
    state = read_state(plan.checkpoint) if plan.checkpoint else {}
    run = Run(plan, policy, optimizer, checkpoints, build_source(plan, policy, state), None, None)
    run.evaluation, run.lock, run.stop = evaluation, lock, stop
    run.profile = Profile(config.profile, run_folder(config) / "profile", dist.get_rank())
    run.peak_flops = config.log.peak_flops or bf16_peak(driver_name())
    run.parts.listen()
    if plan.checkpoint is not None:
        _continue(run, plan.checkpoint)
    run.sinks = _open_sinks(plan, run.done) if first else None
    run.progress = _open_progress(plan, run.done) if first and config.log.progress else None
    (planned, _), (backend, why) = (choose(config.model.logprob_backend) for choose in (choose_backend, working_backend))
    if backend != planned:
        run.say(f"The head is computed by {backend}, not by {planned}: {why}.")
    if config.train.hang_factor is not None:
        run.heart = Heartbeat(config.train.hang_factor, config.train.hang_seconds)
        run.hang = HangWatch(run.heart, run_folder(config) / "stacks", dist.get_rank())
    return run


def _continue(run: Run, checkpoint: Path) -> None:
    """Collective. The run as it stood at the checkpoint, its reference included."""
    plan, state = run.plan, read_state(checkpoint)
    run.done = Progressed(**{f.name: state[f.name] for f in dataclasses.fields(Progressed) if f.name in state})
    phase = phase_of(plan.phases, min(run.done.step, plan.steps - 1))
    if run.done.step > phase.first_step:  # in the middle of it; at its beginning `enter` does all this
        if plan.needs_reference(phase):
            run.reference = build_reference(plan, run.policy, phase.first_step)
        if phase.objective.critic:
            run.critic = build_critic(plan)
    run.checkpoints.load(checkpoint, run.models(), plan.config.checkpoint.load_optimizer)
    if not plan.config.checkpoint.load_optimizer:
        for _, optimizer in run.models().values():
            optimizer.reload_model_params()


def build_source(plan: RunPlan, policy: Policy, state: Mapping[str, Any]) -> Source:
    """Collective. Rows of the file, or what an engine answers to them; `state` is that of the checkpoint."""
    if isinstance(plan.data, Prompts):
        return Sampled(plan.config, plan.data, plan.template, open_engine(plan, policy), state)
    return Rows(plan.data.groups, plan.sampler)


def build_policy(plan: RunPlan) -> Policy:
    """Collective. The policy with the weights of the Hugging Face folder, wrapped for training."""
    config = plan.config
    megatron = transformer_config(plan.family, plan.hf, config.model, config.parallel, plan.mesh, config.fp8)
    chunks = build_chunks(megatron, plan.hf, config.model, plan.mesh)
    with_adapters(chunks, config.lora)
    import_hf(chunks, Path(config.model.path), plan.hf)
    init_adapters(chunks, plan.hf, config.lora, config.train.seed)
    return policy_of(plan, distribute(chunks, megatron, config.parallel), megatron)


def build_reference(plan: RunPlan, policy: Policy, first_step: int = 0) -> Reference:
    """Collective. The frozen reference; `policy` is as it was, but for what it lends itself to in between.

    Args:
        first_step: of the phase, where the policy has gone on since then: the weights are read from the checkpoint of that step
            (the warm-up's last), or where there was none before it from `model.path`.
    """
    config = plan.config
    reference: Reference = Swapped()
    if config.reference.placement == "copy":
        megatron = transformer_config(plan.family, plan.hf, config.model, config.parallel, plan.mesh, config.fp8)
        chunks = build_chunks(megatron, plan.hf, config.model, plan.mesh)
        with_adapters(chunks, config.lora)
        reference = Copied(policy_of(plan, half(chunks, megatron), megatron))
    mine = Swapped()
    if config.reference.path is not None:
        mine.take(policy)
        import_hf(policy.chunks, Path(config.reference.path), plan.hf)
    elif first_step:
        load_model(checkpoint_folder(config) / f"step-{first_step:08d}", policy.gpt_models())
    reference.take(policy)
    if config.reference.path is not None:
        mine.give_back(policy)
    return reference


def policy_of(plan: RunPlan, chunks: list[torch.nn.Module], megatron: TransformerConfig) -> Policy:
    """The chunks with what is known about them."""
    return Policy(
        chunks=chunks,
        config=megatron,
        family=plan.family,
        hf=plan.hf,
        source=Path(plan.config.model.path),
        mesh=plan.mesh,
        temperature=plan.config.train.temperature,
        routing_replay=plan.config.model.moe_routing_replay is True,  # those of rollouts come with their samples
        no_grad_microbatches=plan.config.train.no_grad_microbatches,
    )


def build_critic(plan: RunPlan) -> Critic:
    """Collective. The value function, with the weights of `critic.path` or `model.path` under a head of zeros."""
    config = plan.config
    megatron = transformer_config(plan.family, plan.hf, config.model, config.parallel, plan.mesh, config.fp8)
    chunks = build_chunks(megatron, plan.hf, config.model, plan.mesh)
    import_hf(chunks, Path(config.critic.path or config.model.path), plan.hf)
    with_value_heads(chunks, megatron)
    policy = policy_of(plan, distribute(chunks, megatron, config.parallel), megatron)
    options = dataclasses.replace(config.optimizer, lr=config.critic.lr, weight_decay=config.critic.weight_decay)
    return Critic(policy, build_optimizer(options, config.parallel, policy), config.critic.lr)


def _lock(folder: Path) -> IO:
    """Hold the folder for this process; the system lets it go when the process ends, however it ends.

    Raises:
        Refused: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: the writers that it forks do not hold it
    except OSError:
        raise Refused(f"run.dir={folder}", "is being trained by another process", "wait for it, or use another run.dir") from None
    return file


def _open_sinks(plan: RunPlan, done: Progressed) -> Sinks:
    config, folder = plan.config, run_folder(plan.config)
    config_file(config).write_text(to_yaml(config))
    (folder / "revision.txt").write_text(revision() + "\n")
    keep_model(Path(config.model.path), folder / "model")
    if config.lora.rank is not None:
        keep_adapter_config(config.lora, Path(config.model.path), folder / "model")
    trackers: list[Any] = []
    if config.log.tensorboard:
        trackers.append(TensorBoard(folder / "tensorboard", resumed_at=done.update))
    if config.log.wandb != "disabled":
        trackers.append(
            WandB(folder, project=config.log.wandb_project, mode=config.log.wandb, name=folder.name, config=flatten(config))
        )
    sinks = Sinks(folder, trackers)
    sinks.resume(done.update)
    return sinks


def _open_progress(plan: RunPlan, done: Progressed) -> Progress:
    progress = Progress(
        TextColumn("{task.description:>6}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    progress.add_task("", total=plan.steps, completed=done.step, text="")
    progress.start()
    return progress


def revision() -> str:
    """Version, and the commit of the code where it runs from a checkout (with a mark where it was changed)."""
    here = Path(__file__).resolve().parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=here, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return f"megapsft {__version__}"
    return f"megapsft {__version__} {described.stdout.strip()}".strip()

