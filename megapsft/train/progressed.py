"""How far a run is."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Progressed:
    """How far the run is; saved with every checkpoint."""

    step: int = 0  # steps done
    update: int = 0  # updates done, skipped ones included
    skipped_updates: int = 0
    skipped_in_a_row: int = 0
    trained_tokens: int = 0
    drawn: int = 0  # of the stream of prompts, where responses to them are sampled
    waiting: list[int] = field(default_factory=list)  # draws that were aborted, and come first in the next step
    held: list[int] = field(default_factory=list)  # draws whose demonstrations wait in rollout.demonstration_buffer
    noise_clipped: float | None = None  # share of ratios, measured once; None: not yet, or nobody asked


__all__ = ["Progressed"]
