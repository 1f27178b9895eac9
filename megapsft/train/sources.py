"""Where the groups of a step come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megapsft.config import Config
from megapsft.data.cache import cached
from megapsft.data.chat_template import ChatTemplate
from megapsft.data.dataset import Dataset
from megapsft.data.demonstrations import load_demonstrations
from megapsft.data.preferences import load_preferences
from megapsft.data.prompts import load_prompts
from megapsft.data.rollouts import load_rollouts
from megapsft.data.sampler import Sampler
from megapsft.types import Group


class Source(Protocol):
    """Deals out the groups of one step after the other."""

    metrics: Mapping[str, float]  # of the groups dealt out last

    def next_groups(self, step: int) -> list[Group]:
        """The groups of `step`: demonstrations, preferences, or prompts with their rollouts. Collective."""

    def epoch(self, step: int) -> float:
        """Epochs done when `step` begins, `step` being the next to be dealt out."""

    def state(self) -> dict[str, Any]:
        """JSON values: what a resumed run needs beside its step."""

    def close(self) -> None:
        """End what it started."""


@dataclass(frozen=True)
class Rows:
    """Rows of a file, in an order that depends on the seed and the step alone: a resumed run needs nothing but its step."""

    groups: Sequence[Group]
    sampler: Sampler
    metrics = {}

    def next_groups(self, step: int) -> list[Group]:
        """The train.batch_size groups of `step`."""
        return [self.groups[index] for index in self.sampler.indices(step)]

    def epoch(self, step: int) -> float:
        return self.sampler.epoch(step)

    def state(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def load_dataset(config: Config, template: ChatTemplate, vocab_size: int) -> Dataset:
    """The file of `data.path` as what `data.kind` says it is.

    Raises:
        Refused: as the loaders, and as `cached` where data.cache names a folder.
    """
    data = config.data
    if data.kind == "prompts":
        load = partial(load_prompts, data, template, vocab_size, config.rollout.max_tokens)
    else:
        loaders = {"demonstrations": load_demonstrations, "preferences": load_preferences, "rollouts": load_rollouts}
        load = partial(loaders[data.kind], data, template, vocab_size)
    return load() if data.cache is None else cached(load, data, Path(config.model.path), vocab_size)
