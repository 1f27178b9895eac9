"""Weights & Biases: one page of a run, however many processes train it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from megapsft.errors import Refused
from megapsft.metrics.shown import Picture, Shown
from megapsft.metrics.trackers import missing
from megapsft.output.whole import write_whole

ID, SENT = "wandb_id", "wandb_sent.json"


class WandB:
    """Implements Tracker, offline or online; a run that goes on in the same `directory` goes on on the same page.

    A page only grows: its rows are numbered, and nothing is taken back. So a process goes on with the number after the last
    one, which offline nobody else knows: folders that begin with the same number replace one another when they are synced. And
    updates that the page has already, from a run that was killed and goes on from an earlier checkpoint, are not sent again.

    Args:
        directory: of the run; `wandb_id` there is the page, `wandb_sent.json` what it has.
        resumed_at: the update that the run goes on from; 0: from the beginning.
        config: shown beside the curves.

    Raises:
        Refused: wandb is not installed.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        project: str,
        mode: Literal["offline", "online"],
        resumed_at: int = 0,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        try:
            import wandb
        except ImportError as error:
            raise Refused(f"log.wandb={mode}", f"needs wandb ({error})", missing("log.wandb=disabled")) from None
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        page, self._file = directory / ID, directory / SENT
        if not page.exists():
            page.write_text(uuid.uuid4().hex[:8])
            self._file.unlink(missing_ok=True)  # of another page
        sent = json.loads(self._file.read_text()) if self._file.exists() else {"rows": 0, "update": -1}
        self._run = wandb.init(
            dir=str(directory),
            project=project,
            name=name,
            mode=mode,
            id=page.read_text().strip(),
            resume="allow",
            config=dict(config or {}),
            # numbers only: neither the console nor the source tree leaves the machine
            settings=wandb.Settings(console="off", disable_code=True, disable_git=True, silent=True),
        )
        # a row is not an update: those of steps, of benchmarks, and pictures have rows of their own
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")
        self._rows = max(sent["rows"], self._run.step)
        self._sent = sent["update"]
        again = resumed_at + 1 if resumed_at else 0  # benchmarks before the first update are of update 0
        self._there = range(again, sent["update"] + 1)

    @property
    def note(self) -> str | None:
        """That updates are not sent again, where it is so."""
        if not self._there:
            return None
        return (
            f"Weights & Biases has this run up to update {self._there[-1]}, and takes nothing back: until then nothing is sent. "
            f"Remove {ID} from the folder of the run to begin another page."
        )

    def write(self, scalars: Mapping[str, float], update: int) -> None:
        self._log(scalars, update)

    def show(self, shown: Sequence[Shown], update: int) -> None:
        """Pictures as images `pictures/<name>`, tables as `tables/<name>`."""
        import wandb

        found: dict[str, Any] = {}
        for one in shown:
            if isinstance(one, Picture):
                found[f"pictures/{one.name}"] = wandb.Image(str(one.png))
            else:
                found[f"tables/{one.name}"] = wandb.Table(columns=list(one.heading), data=[list(row) for row in one.rows])
        self._log(found, update)

    def close(self) -> None:
        self._run.finish()

    def _log(self, values: Mapping[str, Any], update: int) -> None:
        if update in self._there:
            return
        self._run.log({"update": update, **values}, step=self._rows, commit=True)
        self._rows, self._sent = self._rows + 1, max(self._sent, update)
        write_whole(self._file, json.dumps({"rows": self._rows, "update": self._sent}) + "\n")


__all__ = ["WandB"]
