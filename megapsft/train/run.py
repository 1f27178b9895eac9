"""A run in progress on this rank: what the loop works with, and where it stands."""

from __future__ import annotations

import dataclasses
import fcntl
import math
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.optimizer import ChainedOptimizer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megapsft import __version__
from megapsft.checkpoint.dist import Checkpoints, read_state
from megapsft.checkpoint.hf import import_hf
from megapsft.config import flatten
from megapsft.data.pack import pack
from megapsft.errors import Refused
from megapsft.metrics.sinks import Sinks, TensorBoard, WandB
from megapsft.policy.build import Policy, build_chunks, distribute, transformer_config
from megapsft.train.optimizer import build_optimizer, forget, learning_rate
from megapsft.train.phases import Phase, phase_of
from megapsft.train.plan import RunPlan, checkpoint_folder, config_file, run_folder, to_yaml
from megapsft.train.sources import DemonstrationSource
from megapsft.train.update import Report
from megapsft.types import Objective, Sample, TrainBatch


class TrainingStopped(RuntimeError):
    """The run cannot go on: too many updates in a row had to be skipped."""


@dataclass
class Progressed:
    """How far the run is; saved with every checkpoint."""

    step: int = 0  # steps done
    update: int = 0  # updates done, skipped ones included
    skipped_updates: int = 0
    skipped_in_a_row: int = 0
    trained_tokens: int = 0


@dataclass
class Run:
    plan: RunPlan
    policy: Policy
    optimizer: ChainedOptimizer
    checkpoints: Checkpoints
    sinks: Sinks | None  # on the first rank only
    progress: Progress | None  # on the first rank only
    done: Progressed = field(default_factory=Progressed)
    reports: list[dict[str, float]] = field(default_factory=list)  # of the step's updates
    since_checkpoint: list[float] = field(default_factory=list)  # `checkpoint.best_metric` of the steps since the last one
    lock: IO | None = None  # held while the run lives, on the first rank
    clock: float = field(default_factory=time.perf_counter)

    @property
    def source(self) -> DemonstrationSource:
        return self.plan.source

    def steps(self) -> Iterator[int]:
        """The steps still to do."""
        self.clock = time.perf_counter()
        yield from range(self.done.step, self.plan.steps)

    def enter(self, step: int) -> Phase:
        """The phase of `step`; where it begins, the optimizer starts afresh."""
        phase = phase_of(self.plan.phases, step)
        if step == phase.first_step:
            forget(self.optimizer)
        return phase

    def pack(self, samples: list[Sample], objective: Objective) -> TrainBatch:
        """This rank's part of the step, cut into the minibatches of its updates."""
        return pack(
            samples,
            minibatch_size=self.plan.minibatch_size,
            layout=self.plan.layout(
                parallel_state.get_data_parallel_rank(), parallel_state.get_context_parallel_rank()
            ),
            aggregation=objective.aggregation,
            max_response_length=objective.max_response_length,
            pad_token_id=self.plan.template.pad_token_id,
        )

    def learning_rate(self, step: int, phase: Phase) -> float:
        return learning_rate(phase.optimizer, step - phase.first_step, phase.steps)

    def log_update(self, step: int, phase: Phase, report: Report) -> None:
        """Count, write and show one update.

        Raises:
            TrainingStopped: train.max_skipped_updates in a row were skipped.
        """
        now, seconds = time.perf_counter(), time.perf_counter() - self.clock
        self.clock = now
        done = self.done
        done.update += 1
        done.trained_tokens += int(report.metrics["data/trained_tokens"])
        done.skipped_updates += report.skipped is not None
        done.skipped_in_a_row = done.skipped_in_a_row + 1 if report.skipped else 0
        metrics = report.metrics | {
            "train/skipped_updates": done.skipped_updates,
            "perf/tokens_per_second": report.metrics["data/real_tokens"] / seconds,
            "perf/seconds": seconds,
        }
        self.reports.append(metrics)
        if self.sinks:
            self.sinks.write_update(self._record(step, phase) | metrics)
        if self.progress:
            self._show(phase, metrics, report.skipped)
        if done.skipped_in_a_row >= self.plan.config.train.max_skipped_updates:
            raise TrainingStopped(
                f"{done.skipped_in_a_row} updates in a row were skipped (train.max_skipped_updates="
                f"{self.plan.config.train.max_skipped_updates}); last: {report.skipped}. Lower optimizer.lr, check the data "
                f"and model.path for values that are not finite; the last checkpoint is untouched."
            )

    def log_step(self, step: int, phase: Phase) -> None:
        """Write the step's own record: token means of its updates, and the entropy of the policy at its start."""
        reports, self.reports = self.reports, []
        self.done.step = step + 1
        tokens = sum(r["data/trained_tokens"] for r in reports)
        record: dict[str, float] = {}
        for key in reports[0]:
            values = [r[key] for r in reports]
            if key.startswith("data/") or key == "perf/seconds":
                record[key] = sum(values)
            elif key.endswith("_max"):
                record[key] = max(values)
            elif key.endswith("_min"):
                record[key] = min(values)
            elif key.startswith(("objective/", "policy/")) or key == "train/loss":
                weighted = sum(v * r["data/trained_tokens"] for v, r in zip(values, reports, strict=True))
                record[key] = weighted / tokens if tokens else 0.0
            elif key == "train/grad_norm":
                record[key] = sum(values) / len(values)
            else:
                record[key] = values[-1]
        record["perf/tokens_per_second"] = record["data/real_tokens"] / record["perf/seconds"]
        best = record.get(self.plan.config.checkpoint.best_metric)
        if best is not None and math.isfinite(best):
            self.since_checkpoint.append(best)
        if self.sinks:
            self.sinks.write_step(self._record(step, phase) | {"epoch": self.source.sampler.epoch(step + 1)} | record)
        self.checkpoints.finish(blocking=False)

    def save_if_due(self, step: int, phase: Phase) -> None:
        """A checkpoint every `checkpoint.interval` steps, at the end of a phase, and at the end of the run."""
        interval = self.plan.config.checkpoint.interval
        if not (step + 1 == phase.end or (interval and (step + 1) % interval == 0)):
            return
        score = sum(self.since_checkpoint) / len(self.since_checkpoint) if self.since_checkpoint else None
        self.since_checkpoint = []
        self.checkpoints.save(step + 1, dataclasses.asdict(self.done), self.policy, self.optimizer, score)

    def close(self) -> None:
        """Wait for the last checkpoint and close what writes."""
        self.checkpoints.finish()
        if self.progress:
            self.progress.stop()
        if self.sinks:
            self.sinks.close()

    def _record(self, step: int, phase: Phase) -> dict[str, Any]:
        return {"update": self.done.update, "step": step + 1, "phase": phase.name, "objective": phase.objective_name}

    def _show(self, phase: Phase, metrics: dict[str, float], skipped: str | None) -> None:
        if skipped:
            self.progress.console.print(f"[yellow]update {self.done.update} skipped: {skipped}")
        text = (
            f"nll {metrics['objective/nll']:.3f}  entropy {metrics['policy/entropy']:.3f}  "
            f"clip {metrics['objective/clip_fraction']:.3f}  {metrics['perf/tokens_per_second']:,.0f} tok/s"
        )
        self.progress.update(
            self.progress.task_ids[0], completed=self.done.update, description=phase.objective_name, text=text
        )


def start(plan: RunPlan) -> Run:
    """Collective. Build the policy and its optimizer, fill them from the checkpoint or the Hugging Face folder, open sinks."""
    config, first = plan.config, dist.get_rank() == 0
    lock = _lock(run_folder(config)) if first else None
    policy = build_policy(plan)
    optimizer = build_optimizer(config.optimizer, config.parallel, policy)
    checkpoints = Checkpoints(checkpoint_folder(config), config.checkpoint)
    done = Progressed()
    if plan.checkpoint is not None:
        checkpoints.load(plan.checkpoint, policy, optimizer if config.checkpoint.load_optimizer else None)
        if not config.checkpoint.load_optimizer:
            optimizer.reload_model_params()
        state = read_state(plan.checkpoint)
        done = Progressed(**{f.name: state[f.name] for f in dataclasses.fields(Progressed)})
    sinks = _open_sinks(plan, done) if first else None
    progress = _open_progress(plan, done) if first and config.log.progress else None
    return Run(plan, policy, optimizer, checkpoints, sinks, progress, done, lock=lock)


def build_policy(plan: RunPlan) -> Policy:
    """Collective. The policy with the weights of the Hugging Face folder, wrapped for training."""
    config = plan.config
    megatron = transformer_config(plan.family, plan.hf, config.model, config.parallel, plan.mesh)
    chunks = build_chunks(megatron, plan.hf, config.model, plan.mesh)
    import_hf(chunks, Path(config.model.path), plan.hf)
    return Policy(
        chunks=distribute(chunks, megatron, config.parallel),
        config=megatron,
        family=plan.family,
        hf=plan.hf,
        source=Path(config.model.path),
        mesh=plan.mesh,
    )


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
    progress.add_task("", total=plan.steps * plan.updates_per_step, completed=done.update, text="")
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

