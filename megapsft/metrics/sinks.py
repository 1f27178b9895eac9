"""Where records go: files, TensorBoard, Weights & Biases. All get the same keys over the same x axis, `update`."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from megapsft.errors import Refused
from megapsft.metrics.records import JSONLines, read_records


class Sink(Protocol):
    """A tracker of scalars."""

    def write(self, scalars: Mapping[str, float], update: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `directory`.

    Args:
        resumed_at: the last update that counts; later ones, from a run that was killed, are hidden. None: a fresh run.
    """

    def __init__(self, directory: str | Path, *, resumed_at: int | None = None):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise Refused("log.tensorboard=true", f"needs tensorboard ({error})", missing("log.tensorboard=false")) from None
        purge_step = None if resumed_at is None else resumed_at + 1
        self._writer = SummaryWriter(str(directory), purge_step=purge_step)

    def write(self, scalars: Mapping[str, float], update: int) -> None:
        for key, value in scalars.items():
            self._writer.add_scalar(key, value, global_step=update)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run, offline or online; a run that resumes in the same `directory` goes on under the same id.

    Args:
        directory: of the run; the id lies in `wandb_id` there.
        config: shown beside the curves.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        project: str,
        mode: Literal["offline", "online"],
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        try:
            import wandb
        except ImportError as error:
            raise Refused(f"log.wandb={mode}", f"needs wandb ({error})", missing("log.wandb=disabled")) from None
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        remembered = directory / "wandb_id"
        if not remembered.exists():
            remembered.write_text(uuid.uuid4().hex[:8])
        self._run = wandb.init(
            dir=str(directory),
            project=project,
            name=name,
            mode=mode,
            id=remembered.read_text().strip(),
            resume="allow",
            config=dict(config or {}),
            # numbers only: neither the console nor the source tree leaves the machine
            settings=wandb.Settings(console="off", disable_code=True, disable_git=True, silent=True),
        )
        # wandb's own step counter cannot go back; as a metric, `update` can, when a run resumes from an older checkpoint
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")

    def write(self, scalars: Mapping[str, float], update: int) -> None:
        self._run.log({"update": update, **scalars})

    def close(self) -> None:
        self._run.finish()


class Sinks:
    """All sinks of a run. Records of an update and records of a step (several updates) have the same keys: in files they
    lie apart, `metrics.jsonl` and `steps.jsonl`, as do those of benchmarks, `evaluations.jsonl`; trackers show those of a step
    as `step/<key>`, over its last update.

    Args:
        directory: of the run.
        trackers: sinks beside the files.

    Example:
        >>> sinks = Sinks("runs/one", [TensorBoard("runs/one/tensorboard")])
        >>> sinks.write_update({"update": 8, "step": 1, "phase": "train", "train/loss": -1.0})
        >>> sinks.write_step({"update": 8, "step": 1, "phase": "train", "train/loss": -1.1})  # trackers: step/train/loss
    """

    def __init__(self, directory: str | Path, trackers: Iterable[Sink] = ()):
        self.updates = JSONLines(Path(directory) / "metrics.jsonl")
        self.steps = JSONLines(Path(directory) / "steps.jsonl")
        self.evaluations = JSONLines(Path(directory) / "evaluations.jsonl")
        self.trackers = tuple(trackers)

    def write_update(self, record: Mapping[str, Any]) -> None:
        """A record of one optimizer update; it holds `update`, and metrics whose keys are `group/name`."""
        self.updates.write(record)
        for tracker in self.trackers:
            tracker.write(scalars(record), record["update"])

    def write_step(self, record: Mapping[str, Any]) -> None:
        """A record of one step; its `update` is the last one of the step."""
        self.steps.write(record)
        for tracker in self.trackers:
            tracker.write({f"step/{key}": value for key, value in scalars(record).items()}, record["update"])

    def write_evaluation(self, record: Mapping[str, Any]) -> None:
        """What benchmarks say of the policy; its `update` is the last one before."""
        self.evaluations.write(record)
        for tracker in self.trackers:
            tracker.write(scalars(record), record["update"])

    def evaluated(self, step: int) -> bool:
        """Whether the last benchmarks were answered after `step` steps."""
        records = read_records(self.evaluations.path)
        return bool(records) and records[-1]["step"] == step

    def resume(self, update: int) -> None:
        """Forget what the files say of later updates: they will come again. Trackers are told when they are made."""
        self.updates.truncate(update)
        self.steps.truncate(update)
        self.evaluations.truncate(update or -1)  # a run that begins answers its benchmarks first

    def close(self) -> None:
        for sink in (self.updates, self.steps, self.evaluations, *self.trackers):
            sink.close()


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a record: what has a key `group/name`."""
    return {key: value for key, value in record.items() if "/" in key}


def missing(otherwise: str) -> str:
    return f"pip install 'megapsft[track]', or set {otherwise}"
