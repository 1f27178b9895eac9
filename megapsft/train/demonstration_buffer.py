"""Demonstrations of prompts that the policy cannot solve, held back until they make updates of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megapsft.types import Group, Objective, Sample


@dataclass
class DemonstrationBuffer:
    """What a step trains, where an objective that imitates instead of exploring (HPT) does so in batches.

    Source: Learning What Reinforcement Learning Can't: Interleaved Online Fine-Tuning for Hardest Questions (Ma et al., 2025),
    ReLIFT: 128 demonstrations, and a fine-tuning step when there are as many. There it has an optimizer of its own; here it
    is updates of the same one, behind those of the rollouts.
    """

    size: int  # 0: nothing is held
    objective: Objective
    held: list[int] = field(default_factory=list)  # draws of the stream of prompts, in the order in which they came

    def exchange(
        self, groups: Sequence[Group], draws: Sequence[int], demonstration_of: Callable[[int], Sample]
    ) -> list[Group]:
        """The groups but those of which demonstrations alone would be trained, and, when there are enough, those held so far."""
        if not self.size:
            return list(groups)
        trained = []
        for group, draw in zip(groups, draws, strict=True):
            flags = self.objective.keep([sample.reward for sample in group], [sample.demonstration for sample in group])
            kept = [sample for sample, flag in zip(group, flags, strict=True) if flag]
            if kept and all(sample.demonstration for sample in kept):
                self.held.append(draw)
            else:
                trained.append(group)
        due = len(self.held) // self.size * self.size
        trained += [(demonstration_of(draw),) for draw in self.held[:due]]
        self.held = self.held[due:]
        return trained
