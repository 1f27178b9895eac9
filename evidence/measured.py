"""What is kept of a run: its curves, its accuracies, and what it took."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megapsft.metrics.records import read_records

DIGITS = 5
CURVES = {  # of the objective's steps, as `megapsft train` records them; those that the objective does not have are left out
    "entropy": "policy/entropy",
    "gradient_norm": "train/grad_norm",
    "clip_fraction": "objective/clip_fraction",
    "reward": "reward/mean",
    "margin": "rewards/margins",
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one run."""

    curves: Mapping[str, Sequence[float]]  # of CURVES, one number a step
    evaluated_after: Sequence[int]  # steps
    accuracy: Mapping[str, Sequence[float]]  # valid, in and out: shares of problems, at `evaluated_after`
    trained_tokens: int
    core_seconds: float


def measure(folder: Path) -> Measured:
    """What the run in the folder left, and the core-seconds of this process and its children."""
    steps, found = read_records(folder / "steps.jsonl"), read_records(folder / "evaluations.jsonl")
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return Measured(
        curves={
            name: [round(step[key], DIGITS) for step in steps] for name, key in CURVES.items() if all(key in s for s in steps)
        },
        evaluated_after=[one["step"] for one in found],
        accuracy={name: [one[f"evaluate/{name}/avg"] for one in found] for name in ("valid", "in", "out")},
        trained_tokens=int(sum(step["data/trained_tokens"] for step in steps)),
        core_seconds=round(sum(use.ru_utime + use.ru_stime for use in used), 1),
    )
