"""The folder of a sweep: what was asked, the runs of its points, and their jobs. The same command goes on with it.

    sweep.json       what was asked; another sweep is refused here
    <point>.yaml     config of a run, for `megapsft train`, whoever starts it
    <point>/         the run
    report.json, report.md, scaling.png
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megapsft.cluster.slurm import records
from megapsft.cluster.slurm.config import ClusterConfig
from megapsft.cluster.slurm.status import progress, status
from megapsft.cluster.slurm.submit import prepare, submit
from megapsft.cluster.sweep.points import Asked, Point
from megapsft.config import flatten, load_config
from megapsft.errors import Refused
from megapsft.output.whole import write_whole
from megapsft.train.plan import to_yaml

ASKED, LOCK = "sweep.json", ".lock"
TO_DO, DONE, IMPOSSIBLE, REFUSED, ENDED, UNKNOWN = "to do", "done", "impossible", "refused", "ended", "unknown"


@dataclass(frozen=True, kw_only=True)
class State:
    """Where a point stands: one of the words above, or that of Slurm for its job, which is not over."""

    name: str
    why: str = ""
    job: str = ""


def state_of(point: Point) -> State:
    """What the run's files say, and Slurm of its last job."""
    if point.refused:
        return State(name=IMPOSSIBLE, why=point.refused)
    run = Path(point.config.run.dir)
    submitted = (records.folder(run) / records.FILE).is_file()
    last = records.read(run)[-1].job if submitted else ""
    now = progress(run)
    if now.finished:
        return State(name=DONE, job=last)
    if not submitted:
        return State(name=TO_DO if now.of is None else ENDED, why="" if now.of is None else f"{now.steps} of {now.of} steps")
    try:
        found = status(run)
    except Refused as error:
        return State(name=UNKNOWN, why=f"{error.value}: {error.rule}", job=last)
    job = found.jobs[-1]
    if not job.over:
        return State(name=job.state.lower(), why=job.reason, job=job.id)
    first = f", rank {found.failure.rank} {found.failure.how}" if found.failure else ""
    return State(name=ENDED, why=f"job {job.id} {job.state}{first}", job=job.id)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder for this process alone.

    Raises:
        Refused: another one has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(str(folder), "is in use by another megapsft sweep", "wait for it") from None
        yield


def check_folder(asked: Asked, folder: Path) -> None:
    """Refuse a folder with another sweep, or with what is none."""
    file = folder / ASKED
    if not file.is_file():
        if folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
            raise Refused(str(folder), f"is not empty, and has no {ASKED}", "name another folder")
        return
    before, now = (_compared(tree) for tree in (json.loads(file.read_text()), as_json(asked)))
    for key in sorted(before | now):
        if before.get(key) != now.get(key):
            rule = f"holds another sweep, with {key}={before.get(key)!r} where {now.get(key)!r} is asked for now"
            raise Refused(str(folder), rule, "ask for the same again, or name another folder")


def as_json(asked: Asked) -> dict[str, Any]:
    """What `sweep.json` holds: plain values, and the config before anything is varied."""
    told = asdict(asked) | {"vary": list(asked.vary.items()), "base": flatten(load_config(asked.config, asked.overrides))}
    return json.loads(json.dumps(told))


def _compared(told: dict[str, Any]) -> dict[str, Any]:
    """Without how it was typed: `base` is what the file and the overrides make."""
    rest = {key: value for key, value in told.items() if key not in ("config", "overrides", "base")}
    return rest | {"nodes": sorted(told["nodes"])} | told["base"]


def write(asked: Asked, points: Sequence[Point], folder: Path) -> None:
    """What was asked, and a config for each point that can run."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / ASKED, json.dumps(as_json(asked), indent=1) + "\n")
    for point in points:
        if not point.refused:
            write_whole(folder / f"{point.name}.yaml", to_yaml(point.config))


def submit_missing(
    points: Sequence[Point], config_file: Path, cluster: ClusterConfig, say: Callable[[str], None]
) -> dict[str, State]:
    """Submit what is neither done nor queued; where each point stands then, by name.

    Args:
        config_file: of the sweep; the shapes of models are looked for beside it.
        say: is told of each job, and of what could not be checked here.

    Raises:
        Refused: there is no Slurm here.
    """
    if shutil.which("sbatch") is None:
        remedy = "use a machine from which jobs are submitted; or train the points that were written, then --report-only"
        raise Refused("sbatch", "is not here", remedy)
    return {point.name: _submitted(point, config_file, cluster, say) for point in points}


def _submitted(point: Point, config_file: Path, cluster: ClusterConfig, say: Callable[[str], None]) -> State:
    state = state_of(point)
    if state.name not in (TO_DO, ENDED):
        return state
    try:
        prepared = prepare(config_file, point.config, cluster, nodes=point.nodes)
        job = submit(prepared)
    except Refused as error:  # of this point alone: others may run
        return State(name=REFUSED, why=f"{error.value}: {error.rule}")
    say(f"submitted {point.name} as job {job}" + (f", again: {state.why}" if state.name == ENDED else ""))
    for note in prepared.notes:
        say(f"{point.name}: {note}")
    return State(name="pending", job=job)
