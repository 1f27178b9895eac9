"""Where the groups of a step come from."""

from __future__ import annotations

from dataclasses import dataclass

from megapsft.config import DataConfig
from megapsft.data.chat_template import ChatTemplate
from megapsft.data.dataset import Dataset
from megapsft.data.demonstrations import load_demonstrations
from megapsft.data.preferences import load_preferences
from megapsft.data.rollouts import load_rollouts
from megapsft.data.sampler import Sampler
from megapsft.types import Group


@dataclass(frozen=True)
class Source:
    """Rows of a file, in an order that depends on the seed and the step alone: a resumed run needs nothing but its step."""

    groups: tuple[Group, ...]
    sampler: Sampler

    def next_groups(self, step: int) -> list[Group]:
        """The train.batch_size groups of `step`: demonstrations, preferences, or prompts with their rollouts."""
        return [self.groups[index] for index in self.sampler.indices(step)]


def load_dataset(config: DataConfig, template: ChatTemplate, vocab_size: int) -> Dataset:
    """The file of `data.path` as what `data.kind` says it is.

    Raises:
        Refused: as the loaders.
    """
    loaders = {"demonstrations": load_demonstrations, "preferences": load_preferences, "rollouts": load_rollouts}
    return loaders[config.kind](config, template, vocab_size)
