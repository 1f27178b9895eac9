"""Results made by hand: every method the same, but for what a test shifts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from evidence.measured import CURVES, Measured
from evidence.methods import table
from evidence.results import Outcome, Results
from evidence.sizes import FULL

SIZES = replace(FULL, seeds=(1, 2, 3))
JITTER = (0.001, -0.002, 0.0015)  # so that no interval is a point
Shifts = Mapping[tuple[str, str], Sequence[float]]  # (method, curve or family) -> what is added, by seed


def made(shifts: Shifts | None = None) -> Results:
    """Curves of ten steps at 1, accuracies from 0.4 over 0.45 to 0.5; shifts are added to curves, and to final accuracies."""
    shifts = shifts or {}
    return {name: _outcome(name, number, shifts) for number, name in enumerate(table(SIZES))}


def _outcome(name: str, number: int, shifts: Shifts) -> Outcome:
    def run(at: int) -> Measured:
        jitter = JITTER[(at + number) % 3] * (1 + number / 100)

        def shift(what: str) -> float:
            return shifts.get((name, what), (0.0, 0.0, 0.0))[at] + jitter

        return Measured(
            curves={curve: [1.0 + shift(curve)] * 10 for curve in CURVES},
            evaluated_after=[0, 5, 10],
            accuracy={family: [0.4, 0.45, 0.5 + shift(family)] for family in ("valid", "in", "out")},
            trained_tokens=1000,
            core_seconds=2.0,
        )

    runs = {seed: run(at) for at, seed in enumerate(SIZES.seeds)}
    trials = {
        rate: replace(runs[1], accuracy=dict.fromkeys(("valid", "in", "out"), [0.4, 1 - 500 * rate])) for rate in (1e-3, 1.2e-3)
    }
    return Outcome(samples=1000, rate=1e-3, trials=trials, runs=runs)
