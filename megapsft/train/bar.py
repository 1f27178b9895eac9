"""The bar of progress on the first rank's terminal, and notes above it."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """Steps done of those planned, and the last update beside them.

    Args:
        steps: of the run.
        done: of these, when it begins.
    """

    def __init__(self, steps: int, done: int):
        self._progress = Progress(
            TextColumn("{task.description:>6}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("", total=steps, completed=done, text="")
        self._progress.start()

    @property
    def console(self) -> Console:
        """Where notes stand above the bar."""
        return self._progress.console

    def update(self, objective: str, metrics: Mapping[str, float]) -> None:
        """Show what an update measured."""
        text = (
            f"nll {metrics['objective/nll']:.3f}  entropy {metrics['policy/entropy']:.3f}  "
            f"clip {metrics['objective/clip_fraction']:.3f}  {metrics['perf/tokens_per_second']:,.0f} tok/s"
        )
        if "reward/mean" in metrics:
            text = f"reward {metrics['reward/mean']:.3f}  {text}"
        self._progress.update(self._task, description=objective, text=text)

    def step(self, done: int) -> None:
        self._progress.update(self._task, completed=done)

    def close(self) -> None:
        self._progress.stop()


__all__ = ["Bar"]
