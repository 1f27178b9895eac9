"""What a file became: groups of samples that fit, and the account of its rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from megapsft.config import DataConfig
from megapsft.data.chat_template import ChatTemplate
from megapsft.errors import Refused
from megapsft.types import Group, Sample


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The groups in the order of the file, and what became of its rows."""

    groups: Sequence[Group]
    rows: int  # read
    dropped: int  # of them: nothing was left to train
    truncated: int  # samples cut to max_length

    @property
    def samples(self) -> tuple[Sample, ...]:
        return tuple(sample for group in self.groups for sample in group)

    @cached_property  # it reads all of the masks
    def response_tokens(self) -> int:
        """Of the samples: what is trained in one epoch."""
        return int(sum(sample.loss_mask.sum() for group in self.groups for sample in group))

    @property
    def prompt_tokens(self) -> int:
        """Of the samples: a prompt counts once for each of its responses."""
        return sum(len(sample) for group in self.groups for sample in group) - self.response_tokens

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about it, beside the counts."""
        return ()


def fitting_length(length: int, prompt_length: int, config: DataConfig, source: str) -> int | None:
    """How many of `length` tokens are kept: all, or those that `overlong` leaves; None where the sample is dropped.

    Raises:
        Refused: overlong=error, and it is.
    """
    if length <= config.max_length:
        return length
    if config.overlong == "error":
        rule = f"has {length} tokens, above data.max_length={config.max_length}"
        raise Refused(source, rule, f"set data.max_length={length}, or data.overlong=drop or truncate")
    if config.overlong == "drop" or prompt_length >= config.max_length:
        return None
    return config.max_length


def check_not_empty(groups: Iterable[Group], config: DataConfig, rows: int, longest: int) -> None:
    """Refuses where no sample fits; `longest` is the length of the longest."""
    if not groups:
        rule = f"drops all {rows} rows of {config.path}"
        raise Refused(f"data.max_length={config.max_length}", rule, f"raise it; the longest row has {longest} tokens")


def check_vocabulary(groups: Iterable[Group], template: ChatTemplate, vocab_size: int) -> None:
    """Refuses a token id outside the embedding, which on a GPU is an error far from its cause."""
    largest = max((sample for group in groups for sample in group), key=lambda sample: sample.token_ids.max())
    token_id, source = int(largest.token_ids.max()), largest.source
    if template.pad_token_id > token_id:
        token_id, source = template.pad_token_id, "padding"
    if token_id >= vocab_size:
        rule = f"vocabulary larger than the embedding: token {token_id} ({source}) needs more than its {vocab_size} rows"
        remedy = "use the tokenizer that belongs to the model in model.path, or give the model a larger embedding"
        raise Refused(f"tokenizer of {len(template.tokenizer)} tokens", rule, remedy)


def check_selects_nothing(config: DataConfig) -> None:
    """Refuses `data.select` where there are no rollouts to choose from."""
    if config.select is not None:
        rule = f"chooses among rollouts, and data.kind={config.kind}"
        raise Refused(f"data.select={config.select}", rule, "use data.kind=rollouts, or leave it out")
