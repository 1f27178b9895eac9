"""megapsft train: one run, here or as one of its ranks."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from megapsft.cli.overrides import OVERRIDES
from megapsft.cli.printed import complain
from megapsft.cli.world import is_first, world_of
from megapsft.errors import TrainingStopped

if TYPE_CHECKING:
    from megapsft.platform.held_signal import HeldSignal
    from megapsft.train.plan import RunPlan
    from megapsft.train.run import Evaluation, Run


def train(
    config: tyro.conf.Positional[Path],
    *,
    dry_run: bool = False,
    profile: bool = False,
    nproc_per_node: int | None = None,
) -> int:
    """Train: megapsft train CONFIG.yaml [key=value ...]. The same command on the same run.dir continues the run.

    For example:
        megapsft train configs/psft/tiny-qwen3-gsm8k.yaml data.path=train.jsonl model.path=models/tiny
        megapsft train configs/psft/tiny-qwen3-gsm8k.yaml parallel.tensor_model_parallel_size=2 train.steps=50
        megapsft train configs/psft/tiny-qwen3-gsm8k.yaml --dry-run
        megapsft train configs/psft/tiny-qwen3-gsm8k.yaml --profile
        torchrun --nproc-per-node 8 -m megapsft.cli train CONFIG.yaml     (or srun: it joins)

    SIGUSR1, or a file RUN/stop, ends it after the step that it is in, saved, to be continued (docs/queue.md).

    Args:
        config: YAML file; `key=value` arguments overlay it, `megapsft config` lists the keys.
        dry_run: check everything, print what would run, start nothing.
        profile: trace the second and third step from here on, or profile.steps, into RUN/profile (docs/profiling.md).
        nproc_per_node: processes to start here; default: the GPUs of this machine, or the fewest that the split needs.
    """
    from megapsft.platform.held_signal import HeldSignal

    asked = None if dry_run else HeldSignal(signal.SIGUSR1)  # before the imports, which take seconds
    from megapsft.config import load_config
    from megapsft.output.places import check_folder
    from megapsft.platform.launch import become_world_of_one, torchrun
    from megapsft.report.plan import show_plan
    from megapsft.train.plan import plan_run, run_folder, with_profile
    from megapsft.train.profile import check_profiles
    from megapsft.train.stop import STOPPED, ask, was_stopped, withdraw

    resolved, overrides = load_config(config, OVERRIDES), list(OVERRIDES)
    world, joined = world_of(resolved.parallel, nproc_per_node)
    plan = plan_run(resolved, world)  # refuses at the door, before any process starts
    check_folder(f"run.dir={resolved.run.dir}", run_folder(resolved))
    if not profile:
        check_profiles(plan.config.profile)
    else:
        plan = with_profile(plan)
        overrides.append(f"profile.steps={list(plan.config.profile.steps)}")
    evaluation = None
    if resolved.evaluate.data:
        from megapsft.evaluate.during_training import DuringTraining

        evaluation = DuringTraining(plan)
    if is_first() and (dry_run or not joined):
        show_plan(plan, whole=dry_run)
    if dry_run:
        return 0
    folder = run_folder(resolved)
    if world > 1 and not joined:
        with asked.passed_on(lambda: ask(folder)):
            code = torchrun(world, ["train", str(config), *overrides])
        if code == 0:
            withdraw(folder)  # what came when there was nobody left to ask
    else:
        if not joined:
            become_world_of_one()
        code = _train_here(plan, evaluation, asked)
    if not joined and code == 0 and was_stopped(folder):
        return STOPPED  # where it joined: 0, for torchrun and srun take anything else for a failure, and end the other ranks
    return code


def _train_here(plan: RunPlan, evaluation: Evaluation | None, asked: HeldSignal) -> int:
    """As one rank of the world that the environment describes."""
    from megapsft import parallel
    from megapsft.platform.compat import hush
    from megapsft.report.picture import has_matplotlib
    from megapsft.report.tracked import tracked
    from megapsft.train.loop import train as loop
    from megapsft.train.start import start

    hush()
    parallel.initialize(plan.mesh, plan.config.parallel, plan.config.train.seed)
    run = start(plan, evaluation, asked.came, tracked)
    if run.journal.tracked and not has_matplotlib():
        run.journal.say("Trackers get no pictures: matplotlib is not installed. pip install 'megapsft[report]' draws them.")
    began = run.done.step
    try:
        loop(run)
    except TrainingStopped as error:  # on all ranks at once
        run.close()
        parallel.shutdown()
        return complain(error)
    if is_first():
        if run.done.step > began:
            _show_parts(run)
        done, stopped = run.done, f"; stopped by {run.stopped}, the same command goes on" if run.stopped else ""
        counts = f"{done.step} steps, {done.update} updates, {done.skipped_updates} of them skipped"
        print(f"{plan.config.run.dir}: {counts}{stopped}")
    parallel.shutdown()
    return 0


def _show_parts(run: Run) -> None:
    """Where its steps went: on the terminal, and in RUN/time.json."""
    from rich.console import Console

    from megapsft.report.step import spent_by, step_table, write_spent

    folder = Path(run.plan.config.run.dir)
    found = spent_by(folder, after=run.parts.take())
    if found is not None:  # its steps trained something
        write_spent(found, folder)
        Console().print(step_table(found, run.plan.config.run.dir))
