"""What a run writes down, shows and says. On the first rank; the same calls on the others do nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from megapsft.metrics.shown import Shown
from megapsft.metrics.sinks import Sinks
from megapsft.train.bar import Bar


class Look(Protocol):
    """What trackers show of a run beside its curves."""

    def __call__(self, folder: Path) -> Sequence[Shown]:
        """Pictures and tables of what the run in `folder` has written so far."""


class Journal:
    """Records to files and trackers, progress and notes to the terminal.

    Args:
        sinks: on the first rank.
        bar: where progress is shown.
        look: None: trackers show curves alone.
    """

    def __init__(self, sinks: Sinks | None = None, bar: Bar | None = None, look: Look | None = None):
        self.sinks, self._bar, self._look = sinks, bar, look
        self._news = False  # since the trackers were shown pictures last

    @property
    def tracked(self) -> bool:
        """Whether a tracker follows the run."""
        return bool(self.sinks and self.sinks.trackers)

    def update(self, record: Mapping[str, Any], skipped: str | None) -> None:
        self._news = True
        if self.sinks:
            self.sinks.write_update(record)
        if self._bar:
            if skipped:
                self._bar.console.print(f"[yellow]update {record['update']} skipped: {skipped}")
            self._bar.update(record["objective"], record)

    def step(self, record: Mapping[str, Any]) -> None:
        if self.sinks:
            self.sinks.write_step(record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        self._news = True
        if self.sinks:
            self.sinks.write_evaluation(record)

    def done(self, step: int) -> None:
        """So many steps are."""
        if self._bar:
            self._bar.step(step)

    def say(self, text: str | None) -> None:
        """A note for the user, above the bar of progress where there is one."""
        if text and self.sinks:
            console = self._bar.console if self._bar else Console(stderr=True)
            console.print(f"[yellow]note:[/] {text}", highlight=False)

    def show(self, folder: Path, update: int) -> None:
        """Pictures and tables to the trackers, where there is something new."""
        if self._news and self._look and self.tracked:
            self.sinks.show(self._look(folder), update)
        self._news = False

    def close(self) -> None:
        if self._bar:
            self._bar.close()
        if self.sinks:
            self.sinks.close()


__all__ = ["Journal", "Look"]
