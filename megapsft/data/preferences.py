"""Preferences: of two responses to a prompt, the better one and the worse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megapsft.config import ColumnsConfig, DataConfig
from megapsft.data.chat_template import ChatTemplate
from megapsft.data.dataset import Dataset, check_not_empty, check_selects_nothing, check_vocabulary, fitting_length
from megapsft.data.progress import watched
from megapsft.data.rows import Prompt, parse_logprobs, parse_messages, parse_prompt, parse_text, read_records
from megapsft.errors import Refused
from megapsft.types import Group, Sample

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Preference:
    """One pair as it stands in the file."""

    prompt: Prompt
    responses: tuple[str, str]  # chosen, rejected
    ref_logprobs: tuple[np.ndarray, np.ndarray] | None  # fp32, of the response tokens
    source: str  # "file:line"


@dataclass(frozen=True, kw_only=True)
class Preferences(Dataset):
    """Each group is (chosen, rejected)."""

    identical: int  # of the dropped rows: both responses have the same tokens, which prefers nothing

    @property
    def notes(self) -> tuple[str, ...]:
        if not self.identical:
            return ()
        return (f"{self.identical} of {self.rows} pairs dropped: chosen and rejected are the same.",)


def load_preferences(config: DataConfig, template: ChatTemplate, vocab_size: int) -> Preferences:
    """Reads, tokenises and fits all pairs of `config.path`; loss_mask is True on the responses with their terminators.

    Where either side is longer than `max_length`, the pair is dropped, that side cut on the right, or the row refused, as
    `overlong` says. Log-probabilities of the reference that the file brings become `Sample.ref_logprobs`.

    Args:
        vocab_size: rows of the model's embedding.

    Raises:
        Refused: what `read_preferences` and `ChatTemplate` refuse; log-probabilities that are not one for each response token,
            terminator included; an overlong side where overlong=error; nothing left; a token id that the embedding does not
            have; `select`.
    """
    check_selects_nothing(config)
    rows = read_preferences(config)
    sources = [row.source for row in rows]
    prompts = template.encode_prompts([row.prompt for row in rows], sources, config.system_prompt)
    sides = [
        template.encode_responses([row.responses[side] for row in rows], [f"{source}: {name}" for source in sources])
        for side, name in enumerate(SIDES)
    ]
    groups: list[Group] = []
    truncated = longest = identical = 0
    encoded = zip(rows, prompts, *sides, strict=True)
    with watched(encoded, f"{config.path}: tokenised", len(rows)) as coming:
        for row, prompt, *responses in coming:
            check_ref_logprobs(row, responses, config.columns)
            longest = max(longest, len(prompt) + max(map(len, responses)))
            lengths = [fitting_length(len(prompt) + len(response), len(prompt), config, row.source) for response in responses]
            if None in lengths:
                continue
            pair = tuple(sample(row, side, prompt, responses[side], lengths[side]) for side in (0, 1))
            if np.array_equal(pair[0].token_ids, pair[1].token_ids):
                identical += 1
                continue
            truncated += sum(length < len(prompt) + len(response) for length, response in zip(lengths, responses, strict=True))
            groups.append(pair)
    if identical == len(rows):
        raise Refused(f"data.path={config.path!r}", "prefers nothing: chosen and rejected are the same in every row", "mend it")
    check_not_empty(groups, config, len(rows), longest)
    check_vocabulary(groups, template, vocab_size)
    return Preferences(
        groups=tuple(groups), rows=len(rows), dropped=len(rows) - len(groups), truncated=truncated, identical=identical
    )


def sample(row: Preference, side: int, prompt: list[int], response: list[int], length: int) -> Sample:
    """One side of the pair, its first `length` tokens."""
    ref_logprobs = None
    if row.ref_logprobs is not None:
        ref_logprobs = np.concatenate([np.zeros(len(prompt), np.float32), row.ref_logprobs[side]])[:length].copy()
    return Sample(
        token_ids=np.array((prompt + response)[:length], dtype=np.int32),
        loss_mask=np.arange(length) >= len(prompt),
        source=f"{row.source}: {SIDES[side]}",
        ref_logprobs=ref_logprobs,
    )


def read_preferences(config: DataConfig) -> list[Preference]:
    """All pairs of `config.path`, or the first `limit`.

    A side is a string, or chat messages of which the last is the assistant's, and those before it, if any, are the prompt's.

    Raises:
        Refused: what `read_records` refuses; wrong types, blank texts; turns before the response that are not the prompt's;
            log-probabilities in some rows or of one side only.
    """
    columns = config.columns
    optional = ("chosen_ref_logprobs", "rejected_ref_logprobs")
    records = read_records(config.path, columns, ("prompt", *SIDES), optional, config.limit)
    rows = [parse_preference(record, columns, source) for source, record in records]
    first = rows[0]
    for row in rows:
        if (row.ref_logprobs is None) != (first.ref_logprobs is None):
            having, lacking = (row, first) if first.ref_logprobs is None else (first, row)
            rule = f"has no log-probabilities of the reference, but {having.source} has"
            raise Refused(lacking.source, rule, "give them in every row, or in none")
    return rows


def parse_preference(record: dict[str, Any], columns: ColumnsConfig, source: str) -> Preference:
    """The pair in a record that has the columns `prompt`, `chosen` and `rejected`."""
    prompt = parse_prompt(record[columns.prompt], f"{source}: column {columns.prompt!r}")
    names = columns.chosen, columns.rejected
    chosen, rejected = (parse_response(record[name], prompt, f"{source}: column {name!r}") for name in names)
    names = columns.chosen_ref_logprobs, columns.rejected_ref_logprobs
    given = [name for name in names if record.get(name) is not None]
    if len(given) == 1:
        raise Refused(source, f"has {given[0]!r} alone", f"give both {names[0]!r} and {names[1]!r}, or neither")
    logprobs = tuple(parse_logprobs(record[name], f"{source}: column {name!r}") for name in given)
    return Preference(prompt, (chosen, rejected), logprobs or None, source)


def parse_response(response: Any, prompt: Prompt, at: str) -> str:
    """The words of the assistant, from a string or from messages that end with them."""
    if not isinstance(response, list):
        return parse_text(response, at)
    *turns, last = parse_messages(response, at)
    if last["role"] != "assistant":
        raise Refused(at, f"ends with a turn of {last['role']!r}", "end it with the assistant's")
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if turns and turns != asked:
        raise Refused(at, "has other turns before the response than the prompt", "write those, or the response alone")
    return parse_text(last["content"], f"{at}, message {len(turns) + 1}")


def check_ref_logprobs(row: Preference, responses: list[list[int]], columns: ColumnsConfig) -> None:
    """Refuses log-probabilities that are not one for each response token."""
    if row.ref_logprobs is None:
        return
    names = columns.chosen_ref_logprobs, columns.rejected_ref_logprobs
    for name, logprobs, response in zip(names, row.ref_logprobs, responses, strict=True):
        if len(logprobs) != len(response):
            rule = f"has {len(logprobs)} entries for {len(response)} response tokens"
            remedy = "compute them with this tokenizer and template, on the response and its terminator"
            raise Refused(f"{row.source}: column {name!r}", rule, remedy)
