"""Where records go: files, and the trackers. All get the same keys over the same x axis, `update`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megapsft.metrics.records import JSONLines, read_records
from megapsft.metrics.shown import Shown
from megapsft.metrics.trackers import Tracker


class Sinks:
    """All sinks of a run. Records of an update and records of a step (several updates) have the same keys: in files they
    lie apart, `metrics.jsonl` and `steps.jsonl`, as do those of benchmarks, `evaluations.jsonl`; trackers show those of a step
    as `step/<key>`, over its last update.

    Args:
        directory: of the run.
        trackers: beside the files.

    Example:
        >>> sinks = Sinks("runs/one", [TensorBoard("runs/one/tensorboard")])
        >>> sinks.write_update({"update": 8, "step": 1, "phase": "train", "train/loss": -1.0})
        >>> sinks.write_step({"update": 8, "step": 1, "phase": "train", "train/loss": -1.1})  # trackers: step/train/loss
    """

    def __init__(self, directory: str | Path, trackers: Iterable[Tracker] = ()):
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

    def show(self, shown: Sequence[Shown], update: int) -> None:
        """Pictures and tables of the run after `update`: to the trackers."""
        for tracker in self.trackers:
            tracker.show(shown, update)

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


__all__ = ["Sinks"]
