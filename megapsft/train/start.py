"""From a plan to a run in progress: what it needs is built, filled from its checkpoint, and opened."""

from __future__ import annotations

import dataclasses
import fcntl
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

from megapsft import __version__
from megapsft.checkpoint.adapters import keep_adapter_config
from megapsft.checkpoint.dist import Checkpoints, read_state
from megapsft.checkpoint.hf_save import keep_model
from megapsft.data.prompts import Prompts
from megapsft.errors import Refused
from megapsft.metrics.sinks import Sinks
from megapsft.platform.chips import bf16_peak, driver_name
from megapsft.platform.hang import HangWatch, Heartbeat
from megapsft.policy.backend import choose_backend, working_backend
from megapsft.policy.build import Policy
from megapsft.train.bar import Bar
from megapsft.train.build import build_critic, build_policy, build_reference
from megapsft.train.engines import open_engine
from megapsft.train.journal import Journal, Look
from megapsft.train.optimizer import build_optimizer
from megapsft.train.phases import phase_of
from megapsft.train.plan import RunPlan, checkpoint_folder, config_file, run_folder, to_yaml
from megapsft.train.profile import Profile
from megapsft.train.progressed import Progressed
from megapsft.train.run import Evaluation, Run
from megapsft.train.sampled import Sampled
from megapsft.train.sources import Rows, Source
from megapsft.train.stop import Stop, go_on
from megapsft.train.tokens import Tokens, forget_tokens
from megapsft.train.trackers import open_trackers


def start(
    plan: RunPlan,
    evaluation: Evaluation | None = None,
    signalled: Callable[[], bool] = lambda: False,
    look: Look | None = None,
) -> Run:
    """Collective. Build the policy and its optimizer, fill them from the checkpoint or the Hugging Face folder, open sinks.

    Args:
        signalled: whether this rank was sent a signal that asks the run to stop.
        look: what trackers show beside curves; None: nothing.
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
    run = Run(plan, policy, optimizer, checkpoints, _build_source(plan, policy, state))
    run.evaluation, run.lock, run.stop = evaluation, lock, stop
    run.profile = Profile(config.profile, run_folder(config) / "profile", dist.get_rank())
    run.peak_flops = config.log.peak_flops or bf16_peak(driver_name())
    run.parts.listen()
    if plan.checkpoint is not None:
        _continue(run, plan.checkpoint)
    if first:
        run.journal = _open_journal(plan, run.done, look)
    if config.log.tokens:
        run.tokens = Tokens(run_folder(config) / "tokens", config.log, plan.template, plan.hf.vocab_size, policy.device)
    (planned, _), (backend, why) = (choose(config.model.logprob_backend) for choose in (choose_backend, working_backend))
    if backend != planned:
        run.journal.say(f"The head is computed by {backend}, not by {planned}: {why}.")
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


def _build_source(plan: RunPlan, policy: Policy, state: Mapping[str, Any]) -> Source:
    """Collective. Rows of the file, or what an engine answers to them; `state` is that of the checkpoint."""
    if isinstance(plan.data, Prompts):
        return Sampled(plan.config, plan.data, plan.template, open_engine(plan, policy), state)
    return Rows(plan.data.groups, plan.sampler)


def _lock(folder: Path) -> IO:
    """Hold the folder for this process; the system lets it go when the process ends, however it ends.

    Raises:
        Refused: it cannot be made; another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"run.dir={folder}", f"cannot be made ({error.strerror})", "name a place where you may write") from None
    file = (folder / ".lock").open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: the writers that it forks do not hold it
    except OSError:
        raise Refused(f"run.dir={folder}", "is being trained by another process", "wait for it, or use another run.dir") from None
    return file


def _open_journal(plan: RunPlan, done: Progressed, look: Look | None) -> Journal:
    config, folder = plan.config, run_folder(plan.config)
    config_file(config).write_text(to_yaml(config))
    (folder / "revision.txt").write_text(revision() + "\n")
    forget_tokens(folder / "tokens", done.update)
    keep_model(Path(config.model.path), folder / "model")
    if config.lora.rank is not None:
        keep_adapter_config(config.lora, Path(config.model.path), folder / "model")
    sinks = Sinks(folder, open_trackers(config, done.update))
    sinks.resume(done.update)
    journal = Journal(sinks, Bar(plan.steps, done.step) if config.log.progress else None, look)
    for tracker in sinks.trackers:
        journal.say(tracker.note)
    return journal


def revision() -> str:
    """Version, and the commit of the code where it runs from a checkout (with a mark where it was changed)."""
    try:
        ours = _git("ls-files", Path(__file__).name)  # not those of a checkout that an environment happens to lie in
        commit = ours and _git("describe", "--always", "--abbrev=40")
        changed = commit and _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.TimeoutExpired):
        return f"megapsft {__version__}"
    return f"megapsft {__version__} {commit}".strip() + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    """Of the checkout that this file is in. Without locks: a run that is killed meanwhile would leave one there."""
    command = ["git", "--no-optional-locks", *arguments]
    here = Path(__file__).resolve().parent
    return subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10).stdout.strip()


__all__ = ["revision", "start"]
