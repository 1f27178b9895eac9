"""A sequence as spans of text: what is prompt, trained, masked, truncated or dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from megapsft.audit.rows import AuditedSample
from megapsft.data.chat_template import ChatTemplate

Kind = Literal["prompt", "trained", "masked", "truncated", "dropped"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class Span:
    """Tokens one behind the other that are treated alike; a special token is a span of its own."""

    kind: Kind
    special: bool
    tokens: int
    text: str


def spans(sample: AuditedSample, template: ChatTemplate) -> tuple[Span, ...]:
    """The whole sequence, special tokens spelt out."""
    special = np.isin(sample.token_ids, template.special_ids)
    kinds = kinds_of(sample)
    changes = (kinds[1:] != kinds[:-1]) | special[1:] | special[:-1]
    borders = [0, *(np.flatnonzero(changes) + 1).tolist(), len(kinds)]
    return tuple(
        Span(
            kind=KINDS[kinds[start]],
            special=bool(special[start]),
            tokens=end - start,
            text=template.spell(sample.token_ids[start:end].tolist()),
        )
        for start, end in zip(borders[:-1], borders[1:], strict=True)
        if end > start
    )


def kinds_of(sample: AuditedSample) -> np.ndarray:
    """[n] int8, index into KINDS."""
    places = np.arange(len(sample.token_ids))
    if sample.dropped is not None:
        return np.full(len(places), KINDS.index("dropped"), np.int8)
    kinds = np.where(places < sample.prompt_length, KINDS.index("prompt"), KINDS.index("masked"))
    kinds = np.where(sample.loss_mask, KINDS.index("trained"), kinds)
    return np.where(places >= sample.kept, KINDS.index("truncated"), kinds).astype(np.int8)
