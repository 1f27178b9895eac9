"""What each run is, and how far it came."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megapsft.report.figure import Grid
from megapsft.report.folders import Shown
from megapsft.report.run import Run
from megapsft.report.section import Section
from megapsft.report.table import HEADING, phase_rows

NONE = "–"
COMMIT, SHORT = re.compile(r"\b[0-9a-f]{40}"), 10  # characters of a commit
ACCURACY = re.compile(r"evaluate/(.+)/avg$")


def section(shown: Shown) -> Section | None:
    if not shown.runs:
        return None
    return Section(name="Runs", figures=[runs_table(shown.runs), phases_table(shown.runs)])


def runs_table(runs: Sequence[Run]) -> Grid:
    """A row for each run: how far it is, and the last of its numbers."""
    heading = ["run", "objective", "steps", "updates", "samples", "skipped", "nll", "entropy", "accuracy (%)", "tokens/s", "code"]
    return Grid(
        name="runs", title="Last values", heading=heading, rows=[_row(run) for run in runs], numbers=frozenset(range(2, 10)),
        note="Accuracy as avg@n with its standard error; code is version and commit, with -dirty where files were changed.",
    )  # fmt: skip


def _row(run: Run) -> list[str]:
    last = run.updates[-1] if run.updates else {}
    objectives = " → ".join(dict.fromkeys(phase.objective for phase in run.phases)) or run.config.get("objective.name", NONE)
    asked = run.config.get("train.steps")
    warmup = run.config.get("train.sft_warmup_steps") or 0
    steps = str(last.get("step", 0)) + ("" if asked is None else f" of {asked + warmup}")
    samples = run.at(last, "samples") if last else 0
    return [
        run.name,
        objectives,
        steps,
        f"{last.get('update', 0):,}",
        NONE if samples != samples else f"{samples:,.0f}",
        _number(last.get("train/skipped_updates"), ".0f"),
        _number(last.get("objective/nll"), ".3f"),
        _number(last.get("policy/entropy"), ".3f"),
        accuracies(run) or NONE,
        _number(run.steps[-1].get("perf/tokens_per_second") if run.steps else None, ",.0f"),
        COMMIT.sub(lambda found: found[0][:SHORT], run.revision) or NONE,
    ]


def accuracies(run: Run) -> str:
    """Of each benchmark, the last time."""
    last = run.evaluations[-1] if run.evaluations else {}
    found = {match[1]: (value, last.get(f"{key}_se")) for key, value in last.items() if (match := ACCURACY.match(key))}
    return "; ".join(
        f"{name} {_number(value, '.1f', 100)}" + ("" if error is None else f" ± {100 * error:.1f}")
        for name, (value, error) in found.items()
    )


def phases_table(runs: Sequence[Run]) -> Grid:
    """A row for each phase of each run."""
    rows = [[run.name, *row] for run in runs for row in phase_rows(run.phases)]
    return Grid(
        name="phases", title="Phases: first → last values", heading=["run", *HEADING], rows=rows, numbers=frozenset(range(2, 7)),
        note="clipped is the mean clip fraction.",
    )  # fmt: skip


def _number(value: float | None, form: str, size: float = 1) -> str:
    return NONE if value is None else format(size * value, form)


__all__ = ["accuracies", "phases_table", "runs_table", "section"]
