"""The training set of demonstrations: every row of the file as a Sample that fits, a group of its own."""

from __future__ import annotations

import numpy as np

from megapsft.config import DataConfig
from megapsft.data.chat_template import ChatTemplate
from megapsft.data.dataset import Dataset, check_not_empty, check_selects_nothing, check_vocabulary, fitting_length
from megapsft.data.progress import watched
from megapsft.data.rows import read_rows
from megapsft.types import Group, Sample


def load_demonstrations(config: DataConfig, template: ChatTemplate, vocab_size: int) -> Dataset:
    """Reads, tokenises and fits all rows of `config.path`; loss_mask is True on the response with its terminator.

    A row longer than `max_length` is dropped, cut on the right, or refused, as `overlong` says. A cut response has no
    terminator; a row whose prompt leaves no room for a response is dropped also where `overlong` is "truncate".

    Args:
        vocab_size: rows of the model's embedding.

    Raises:
        Refused: what `read_rows` and `ChatTemplate` refuse; an overlong row where overlong=error; nothing left;
            a token id that the embedding does not have; `select`.
    """
    check_selects_nothing(config)
    rows = read_rows(config.path, config.columns, config.limit)
    groups: list[Group] = []
    truncated = longest = 0
    encoded = zip(rows, template.encode_rows(rows, config.system_prompt), strict=True)
    with watched(encoded, f"{config.path}: tokenised", len(rows)) as coming:
        for row, (token_ids, prompt_length) in coming:
            longest = max(longest, len(token_ids))
            length = fitting_length(len(token_ids), prompt_length, config, row.source)
            if length is None:
                continue
            truncated += length < len(token_ids)
            token_ids = token_ids[:length].copy()  # a view would keep the whole row in memory
            groups.append((Sample(token_ids=token_ids, loss_mask=np.arange(length) >= prompt_length, source=row.source),))
    check_not_empty(groups, config, len(rows), longest)
    check_vocabulary(groups, template, vocab_size)
    return Dataset(groups=tuple(groups), rows=len(rows), dropped=len(rows) - len(groups), truncated=truncated)
