"""Prompts that responses are sampled to, each with the answer that they are measured by, and perhaps a demonstration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megapsft.config import ColumnsConfig, DataConfig
from megapsft.data.chat_template import ChatTemplate
from megapsft.data.dataset import Dataset, check_vocabulary, fitting_length
from megapsft.data.progress import watched
from megapsft.data.rollouts import check_selection
from megapsft.data.rows import Prompt, check_columns, named, parse_prompt, parse_text, read_whole_records
from megapsft.errors import Refused
from megapsft.types import Group, Sample


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """One row of the file."""

    prompt: Prompt  # text or chat messages
    token_ids: tuple[int, ...]
    reference: str | None  # the right answer, or a solution that ends with it
    demonstration: Sample | None  # behind the prompt
    row: Mapping[str, Any]  # as it stands in the file
    source: str  # "file:line"


@dataclass(frozen=True, kw_only=True)
class Prompts(Dataset):
    """Each group is what is known before anything is sampled: the demonstration behind its prompt, or the bare prompt."""

    prompts: tuple[PromptRow, ...]
    too_long: int  # prompts that leave no room for a response
    demonstrations: int

    @property
    def notes(self) -> tuple[str, ...]:
        notes = []
        if self.too_long:
            notes.append(f"{self.too_long} of {self.rows} prompts dropped: no room for rollout.max_tokens.")
        if 0 < self.demonstrations < len(self.prompts):
            notes.append(f"{self.demonstrations} of {len(self.prompts)} prompts have a demonstration that fits.")
        return tuple(notes)


def load_prompts(config: DataConfig, template: ChatTemplate, vocab_size: int, max_tokens: int) -> Prompts:
    """Reads and tokenises all rows of `config.path`, or the first `limit`.

    A row has a prompt, and if it has them the columns `reference` and `demonstration`. A prompt that leaves no room for
    `max_tokens` within `max_length` is dropped, or refused where overlong=error; a demonstration that does not fit is left out.

    Args:
        vocab_size: rows of the model's embedding.
        max_tokens: of a response.

    Raises:
        Refused: what `read_records`, `parse_prompt` and `ChatTemplate` refuse; no prompt that fits; overlong=truncate.
    """
    check_selection(config)
    if config.overlong == "truncate":
        rule = "cuts responses, and those to data.kind=prompts are sampled with rollout.max_tokens"
        raise Refused("data.overlong=truncate", rule, "use data.overlong=drop or error")
    columns = config.columns
    records = read_whole_records(config.path, columns, ("prompt",), ("reference", "demonstration"), config.limit)
    rows = [parse_problem(record, columns, source) for source, record in records]
    encoded = template.encode_prompts([row[0] for row in rows], [source for source, _ in records], config.system_prompt)
    shown = [(text, source) for (_, _, text), (source, _) in zip(rows, records, strict=True) if text is not None]
    responses = template.encode_responses([text for text, _ in shown], [f"{source}: demonstration" for _, source in shown])
    prompts, longest = [], 0
    together = zip(rows, records, encoded, strict=True)
    with watched(together, f"{config.path}: tokenised", len(rows)) as coming:
        for (prompt, reference, text), (source, record), ids in coming:
            demonstration = None if text is None else _demonstration(ids, next(responses), config, source)
            longest = max(longest, len(ids))
            if fitting_length(len(ids) + max_tokens, len(ids), config, source) is None:
                continue
            prompts.append(
                PromptRow(
                    prompt=prompt,
                    token_ids=tuple(ids),
                    reference=reference,
                    demonstration=demonstration,
                    row=record,
                    source=source,
                )
            )
    if not prompts:
        rule = f"leaves none of {len(rows)} prompts of up to {longest} tokens room for rollout.max_tokens={max_tokens}"
        raise Refused(f"data.max_length={config.max_length}", rule, f"use {longest + max_tokens}, or fewer rollout.max_tokens")
    groups = tuple(_known(prompt) for prompt in prompts)
    check_vocabulary(groups, template, vocab_size)
    return Prompts(
        groups=groups,
        rows=len(rows),
        dropped=len(rows) - len(prompts),
        truncated=0,
        prompts=tuple(prompts),
        too_long=len(rows) - len(prompts),
        demonstrations=sum(prompt.demonstration is not None for prompt in prompts),
    )


def parse_problem(record: dict[str, Any], columns: ColumnsConfig, source: str) -> tuple[Prompt, str | None, str | None]:
    """Prompt, reference and demonstration of a row."""
    check_columns(record, named(columns, ["prompt"]), source)
    prompt = parse_prompt(record[columns.prompt], f"{source}: column {columns.prompt!r}")
    reference = record.get(columns.reference)
    if reference is not None and not isinstance(reference, str):
        if isinstance(reference, bool) or not isinstance(reference, int | float):
            raise Refused(f"{source}: column {columns.reference!r}", f"is a {type(reference).__name__}", "write a string")
        reference = str(reference)  # AIME's answers are numbers
    text = record.get(columns.demonstration)
    if text is not None:
        text = parse_text(text, f"{source}: column {columns.demonstration!r}")
    return prompt, reference, text


def _demonstration(prompt: list[int], response: list[int], config: DataConfig, source: str) -> Sample | None:
    token_ids = np.array(prompt + response, dtype=np.int32)
    if fitting_length(len(token_ids), len(prompt), config, f"{source}: demonstration") is None:
        return None
    return Sample(
        token_ids=token_ids,
        loss_mask=np.arange(len(token_ids)) >= len(prompt),
        source=f"{source}: demonstration",
        reward=1.0,
        rollout_logprobs=np.zeros(len(token_ids), np.float32),  # no engine sampled it
    )


def _known(row: PromptRow) -> Group:
    if row.demonstration is not None:
        return (row.demonstration,)
    ids = np.array(row.token_ids, dtype=np.int32)
    return (Sample(token_ids=ids, loss_mask=np.zeros(len(ids), bool), source=row.source, demonstration=False),)
