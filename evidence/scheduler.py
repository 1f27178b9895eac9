"""Runs side by side, each in a forked child, until none is missing."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from evidence import forked
from evidence.measured import Measured
from evidence.plan import Plan
from evidence.runs import Spec, carry_out, make_data, stored
from evidence.sizes import Sizes
from megapsft.errors import Refused

SECONDS = {"pretrain.yaml": 50, "finetune.yaml": 30, "rl.yaml": 40, "dpo.yaml": 6}  # core-seconds at full size, about


class Store:
    """What came of runs, each file read once."""

    def __init__(self, work: Path):
        self._work = work
        self._known: dict[str, Measured] = {}

    def __call__(self, spec: Spec) -> Measured | None:
        if spec.digest not in self._known and (measured := stored(spec, self._work)) is not None:
            self._known[spec.digest] = measured
        return self._known.get(spec.digest)


def first_look(sizes: Sizes, work: Path) -> dict[str, tuple[str, Spec, bool]]:
    """Digest -> (what it is, run, whether it is done), with a guess where a learning rate is yet to be chosen."""
    store = Store(work)
    return {spec.digest: (label, spec, store(spec) is not None) for label, spec in Plan(sizes, store, guess=True).known()}


def run_all(sizes: Sizes, work: Path, workers: int) -> Plan:
    """Do what is missing; the plan, all of whose runs are done.

    Raises:
        Refused: another process is at work in the folder.
        RuntimeError: a run failed, with the end of what it printed; the others are ended.
    """
    running: dict[int, tuple[str, Spec]] = {}
    plan = Plan(sizes, Store(work))
    with _alone(work), _bar(len(first_look(sizes, work))) as progress:
        make_data(sizes.amounts, work)
        try:
            while True:
                todo, done = _todo(plan, {spec.digest for _, spec in running.values()})
                if todo:
                    forked.warm_up()
                for label, spec in todo[: workers - len(running)]:
                    log = work / "logs" / f"{spec.digest}.log"
                    running[forked.fork(lambda spec=spec: carry_out(spec, work), log)] = label, spec
                now = "; ".join(label for label, _ in running.values())
                progress.update(progress.task_ids[0], completed=done, description=now, refresh=True)
                if not running:
                    return plan
                ended = forked.wait()
                label, spec = running.pop(ended.pid)
                if not ended.succeeded:
                    log = work / "logs" / f"{spec.digest}.log"
                    raise RuntimeError(f"{label} failed; the end of {log}:\n{log.read_text()[-3000:]}")
        finally:
            for pid in running:
                forked.end(pid)


def _todo(plan: Plan, running: set[str]) -> tuple[list[tuple[str, Spec]], int]:
    """Runs that may begin, and how many are done."""
    known = {spec.digest: (label, spec) for label, spec in plan.known()}
    missing = [one for digest, one in known.items() if plan.stored(one[1]) is None and digest not in running]
    done = len([1 for _, spec in known.values() if plan.stored(spec)])
    return [one for one in missing if one[1].start is None or plan.stored(one[1].start)], done


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(str(work), "is another process's, which is at work in it", "wait, or name another folder") from None
        yield


@contextmanager
def _bar(runs: int) -> Iterator[Progress]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, auto_refresh=False) as progress:  # by a thread, which might hold a lock in the moment of a fork
        progress.add_task("", total=runs)
        yield progress
