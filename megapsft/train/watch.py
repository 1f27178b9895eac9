"""What is not wrong but does nothing, said aloud while it happens: each kind of it the first time, and then ever more rarely."""

from __future__ import annotations

from dataclasses import dataclass, field

from megapsft.train.phases import Phase, has_old_policy

STEPS_WITHOUT_CLIP = 20  # after so many the clip is said to be out of reach


@dataclass
class Watch:
    """Of one run on its first rank."""

    zero_advantages: int = 0  # updates
    steps_without_clip: int = 0  # in a row, since the run or its process began
    largest_ratio: float = 0.0  # of those steps
    said: set[str] = field(default_factory=set)

    def update(self, number: int, metrics: dict[str, float]) -> str | None:
        """What to say about update `number`."""
        if not metrics.get("advantages/max", 1.0) == metrics.get("advantages/min", 1.0) == 0.0:
            return None
        self.zero_advantages += 1
        if self.zero_advantages & (self.zero_advantages - 1):  # 1, 2, 4, 8, ...
            return None
        return (
            f"update {number}: every advantage is zero (the rewards of each group are equal); it moves the weights by momentum "
            f"and decay alone. Updates like it so far: {self.zero_advantages}. More rollouts a prompt, or prompts of another "
            f"difficulty, would help."
        )

    def step(self, phase: Phase, metrics: dict[str, float], updates: int) -> str | None:
        """What to say about a step."""
        clips = [getattr(phase.objective, name, None) for name in ("clip_high", "clip", "on_policy_clip")]
        clip = next((value for value in clips if value is not None), None)
        if clip is None or not has_old_policy(phase.objective) or updates == 1 or metrics["objective/clip_fraction"] > 0:
            self.steps_without_clip, self.largest_ratio = 0, 0.0
            return None
        self.steps_without_clip += 1
        self.largest_ratio = max(self.largest_ratio, metrics["objective/ratio_max"])
        if self.steps_without_clip != STEPS_WITHOUT_CLIP or "clip" in self.said:
            return None
        self.said.add("clip")
        return (
            f"{phase.objective_name}: no ratio has reached the clip in {STEPS_WITHOUT_CLIP} steps (the largest was "
            f"{self.largest_ratio:.4f}, the clip is {clip}): it does nothing. Raise optimizer.lr or the updates of a step "
            f"(train.minibatch_size), or lower the clip."
        )
