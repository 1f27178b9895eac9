"""Where the samples of a step come from."""

from __future__ import annotations

from dataclasses import dataclass

from megapsft.data.demonstrations import Demonstrations
from megapsft.data.sampler import Sampler
from megapsft.types import Sample


@dataclass(frozen=True)
class DemonstrationSource:
    """Rows of a file, in an order that depends on the seed and the step alone: a resumed run needs nothing but its step."""

    demonstrations: Demonstrations
    sampler: Sampler

    def next_samples(self, step: int) -> list[Sample]:
        """The train.batch_size samples of `step`."""
        return [self.demonstrations.samples[index] for index in self.sampler.indices(step)]
