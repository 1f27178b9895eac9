"""A finding of a paper as something that can be checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evidence.results import Results
from evidence.sizes import Sizes
from evidence.verdict import Verdict
from megapsft.report.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Claim:
    letter: str
    title: str  # what the paper found
    source: str
    criterion: str  # in words what `judge` computes
    judge: Callable[[Results, Sizes], Verdict]
    draw: Callable[[Results, Sizes], Sequence[Figure]]
