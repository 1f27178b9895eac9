"""A run in progress on this rank: what the loop works with, and where it stands."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megapsft.checkpoint.adapters import BASE
from megapsft.checkpoint.dist import Checkpoints, Trained
from megapsft.checkpoint.together import from_first
from megapsft.data.pack import pack
from megapsft.errors import TrainingStopped
from megapsft.platform.clock import Clock, part
from megapsft.platform.hang import HangWatch, Heartbeat
from megapsft.platform.memory import memory_of_fullest_rank
from megapsft.policy.build import Policy
from megapsft.policy.reference import Reference
from megapsft.train.build import build_critic, build_reference
from megapsft.train.critic import Critic
from megapsft.train.gate import gather_evidence
from megapsft.train.journal import Journal
from megapsft.train.noise_limit import limit_of
from megapsft.train.optimizer import forget, learning_rate
from megapsft.train.phases import Phase, phase_of
from megapsft.train.plan import RunPlan, run_folder
from megapsft.train.profile import Profile
from megapsft.train.progressed import Progressed
from megapsft.train.sources import Source
from megapsft.train.step_record import of_step, speed
from megapsft.train.stop import Stop
from megapsft.train.tokens import Tokens
from megapsft.train.update import Report
from megapsft.train.watch import Watch
from megapsft.types import Group, Objective, TrainBatch


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
    journal: Journal = field(default_factory=Journal)
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
    tokens: Tokens | None = None  # where log.tokens asks for it
    peak_flops: float | None = None  # FLOP/s of a device, where they are known
    clock: float = field(default_factory=time.perf_counter)

    def steps(self) -> Iterator[int]:
        """The steps still to do, until the run is stopped."""
        if self.evaluation is not None and not from_first(lambda: self.journal.sinks.evaluated(self.done.step)):
            self.evaluate_if_due(self.done.step - 1)  # before the first step, or where a stop came before the benchmarks
        self.clock = time.perf_counter()
        for step in range(self.done.step, self.plan.steps):
            if self.profile:
                with self._uncounted():
                    self.profile.begin(step + 1)
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
        if self.tokens:
            self.tokens.begin(step, self.source.epoch(step))
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
        if dist.get_rank() == 0:
            evidence.write(run_folder(self.plan.config))
        if not evidence.accepted:
            self.close()
            evidence.refuse()
        self.journal.say(f"Noise: {evidence}; train.max_noise_clipped={limit:g} allows that.")

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
        if self.tokens:
            self.tokens.end_update(done.update, report.skipped is not None)
        self.journal.update(self._record(step, phase) | metrics, report.skipped)
        if step >= phase.policy_from:
            self.journal.say(self.watch.update(done.update, metrics))
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
        self.journal.done(step + 1)
        for name, value in self.source.state().items():
            setattr(self.done, name, value)
        if not reports:
            kind = self.plan.config.data.kind
            self.journal.say(f"step {step + 1}: {phase.objective_name} trains none of its {kind}; nothing was updated.")
            if self.source.metrics:
                self.journal.step(self._record(step, phase) | dict(self.source.metrics))
            return
        record = of_step(reports)
        record |= self._speed(record)
        record["perf/memory_bytes"] = float(memory_of_fullest_rank(self.policy.device))
        record |= self.source.metrics
        record |= {f"perf/{name}_seconds": seconds for name, seconds in self.parts.take().items()}
        best = record.get(self.plan.config.checkpoint.best_metric)
        if best is not None and math.isfinite(best) and step >= phase.policy_from:  # before, the policy was not trained
            self.since_checkpoint.append(best)
        self.journal.step(self._record(step, phase) | {"epoch": self.source.epoch(step + 1)} | record)
        if step >= phase.policy_from:
            self.journal.say(self.watch.step(phase, record, len(reports)))
        with part("checkpoint"):
            self.checkpoints.finish(blocking=False)

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
        self.journal.evaluation({"update": self.done.update, "step": done} | metrics)
        found = (f"{key.removeprefix('evaluate/')} {value:.4g}" for key, value in metrics.items())
        self.journal.say(f"step {done}: {', '.join(found)}")

    def save_if_due(self, step: int, phase: Phase) -> None:
        """A checkpoint every `checkpoint.interval` steps, at the end of a phase, and at the end of the run, stopped or not."""
        interval = self.plan.config.checkpoint.interval
        if not (self.stopped or step + 1 == phase.end or (interval and (step + 1) % interval == 0)):
            return
        self.heart.rest()
        if self.tokens:
            self.tokens.write_counts()
        score = sum(self.since_checkpoint) / len(self.since_checkpoint) if self.since_checkpoint else None
        self.since_checkpoint = []
        state = dataclasses.asdict(self.done) | ({BASE: self.plan.base} if self.plan.base else {})
        with part("checkpoint"):
            self.checkpoints.save(step + 1, state, self.models(), score)
        if not self.stopped and step + 1 < self.plan.steps:
            self._show()

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
        self._show()
        if self.profile:
            self.profile.finish()
        if self.evaluation is not None:
            self.evaluation.close()
        self.source.close()
        if self.tokens:
            self.tokens.close()
        self.journal.close()
        if self.stop and dist.get_rank() == 0:
            self.stop.settle(self.done.step, self.stopped)

    def _show(self) -> None:
        with self._uncounted():
            self.journal.show(run_folder(self.plan.config), self.done.update)

    def _write_profile(self) -> None:
        self.heart.rest()
        with self._uncounted():
            self.profile.finish()
        if self.plan.config.profile.tool == "torch":
            self.journal.say(f"traces are in {run_folder(self.plan.config) / 'profile'}")

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        """The body is in the time of no update: what went by before it still is."""
        began = time.perf_counter()
        yield
        self.clock += time.perf_counter() - began

    def _speed(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return speed(metrics, self.plan.mesh.world_size, self.peak_flops)

    def _evaluation_due(self, done: int) -> bool:
        return self.evaluation is not None and (done % self.plan.config.evaluate.interval == 0 or done == self.plan.steps)

    def _record(self, step: int, phase: Phase) -> dict[str, Any]:
        name = phase.name if step >= phase.policy_from else "critic"
        return {"update": self.done.update, "step": step + 1, "phase": name, "objective": phase.objective_name}


__all__ = ["Evaluation", "Run"]
