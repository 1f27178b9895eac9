"""The training set: every row of the file as a Sample that fits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megapsft.config import DataConfig
from megapsft.data.chat_template import ChatTemplate
from megapsft.data.rows import read_rows
from megapsft.errors import Refused
from megapsft.types import Sample


@dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """The samples in the order of the file, and what became of its rows."""

    samples: tuple[Sample, ...]
    rows: int  # read
    dropped: int  # longer than max_length
    truncated: int  # cut to max_length
    prompt_tokens: int  # of the samples
    response_tokens: int  # of the samples: what is trained in one epoch


def load_demonstrations(config: DataConfig, template: ChatTemplate, vocab_size: int) -> Demonstrations:
    """Reads, tokenises and fits all rows of `config.path`; loss_mask is True on the response with its terminator.

    A row longer than `max_length` is dropped, cut on the right, or refused, as `overlong` says. A cut response has no
    terminator; a row whose prompt leaves no room for a response is dropped also where `overlong` is "truncate".

    Args:
        vocab_size: rows of the model's embedding.

    Raises:
        Refused: what `read_rows` and `ChatTemplate` refuse; an overlong row where overlong=error; nothing left;
            a token id that the embedding does not have.
    """
    rows = read_rows(config.path, config.columns, config.limit)
    samples: list[Sample] = []
    dropped = truncated = prompt_tokens = longest = 0
    for row, (token_ids, prompt_length) in zip(rows, template.encode_rows(rows, config.system_prompt), strict=True):
        longest = max(longest, len(token_ids))
        if len(token_ids) > config.max_length:
            if config.overlong == "error":
                rule = f"has {len(token_ids)} tokens, above data.max_length={config.max_length}"
                raise Refused(row.source, rule, f"set data.max_length={len(token_ids)}, or data.overlong=drop or truncate")
            if config.overlong == "drop" or prompt_length >= config.max_length:
                dropped += 1
                continue
            token_ids = token_ids[: config.max_length].copy()  # a view would keep the whole row in memory
            truncated += 1
        samples.append(Sample(token_ids=token_ids, loss_mask=np.arange(len(token_ids)) >= prompt_length, source=row.source))
        prompt_tokens += prompt_length
    if not samples:
        rule = f"drops all {len(rows)} rows of {config.path}"
        raise Refused(f"data.max_length={config.max_length}", rule, f"raise it; the longest row has {longest} tokens")

    check_vocabulary(samples, template, vocab_size)
    return Demonstrations(
        samples=tuple(samples),
        rows=len(rows),
        dropped=dropped,
        truncated=truncated,
        prompt_tokens=prompt_tokens,
        response_tokens=sum(len(sample) for sample in samples) - prompt_tokens,
    )


def check_vocabulary(samples: list[Sample], template: ChatTemplate, vocab_size: int) -> None:
    """Refuses a token id outside the embedding, which on a GPU is an error far from its cause."""
    largest = max(samples, key=lambda sample: sample.token_ids.max())
    token_id, source = int(largest.token_ids.max()), largest.source
    if template.pad_token_id > token_id:
        token_id, source = template.pad_token_id, "padding"
    if token_id >= vocab_size:
        rule = f"vocabulary larger than the embedding: token {token_id} ({source}) needs more than its {vocab_size} rows"
        remedy = "use the tokenizer that belongs to the model in model.path, or give the model a larger embedding"
        raise Refused(f"tokenizer of {len(template.tokenizer)} tokens", rule, remedy)
