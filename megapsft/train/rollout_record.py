"""Rollouts as files have them: what rewards are given of them, and the rows that `data.kind=rollouts` reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megapsft.data.chat_template import ChatTemplate
from megapsft.output.whole import whole
from megapsft.rewards.sum import Response, Scored
from megapsft.rollout.base import Rollout


def response_of(row: Any, rollout: Rollout, number: int, template: ChatTemplate) -> Response:
    """What rewards are given: the words of the response, without the token that ended it."""
    ids = rollout.response_ids
    ended = rollout.finish_reason == "stop" and ids and ids[-1] in template.stop_token_ids
    return Response(
        prompt=row.prompt,
        text=template.tokenizer.decode(ids[:-1] if ended else ids),
        tokens=len(ids),
        source=f"{row.source}: rollout {number}",
        reference=row.reference,
        row=row.row,
    )


def rollout_record(row: Any, rollout: Rollout, template: ChatTemplate, logprobs: bool) -> dict[str, Any]:
    """A rollout of a row: its words to be read, its ids to be used.

    Args:
        logprobs: whether they are kept, in the fewest digits that give the same fp32.
    """
    record = {
        "response": response_of(row, rollout, 1, template).text,
        "token_ids": list(rollout.response_ids),
        "finish_reason": rollout.finish_reason,
        "weight_version": rollout.weight_version,
    }
    if logprobs:
        record["logprobs"] = [float(str(x)) for x in np.array(rollout.rollout_logprobs, dtype=np.float32)]
    return record


def group_record(
    row: Any, rollouts: Sequence[Rollout], scored: Sequence[Scored] | None, template: ChatTemplate, /, **ours: Any
) -> dict[str, Any]:
    """The row's own columns, then `ours`, the prompt's token ids, and the rollouts with what they are worth."""
    records = [rollout_record(row, rollout, template, logprobs=True) for rollout in rollouts]
    if scored is not None:
        records = [{"reward": worth.total, **record} for record, worth in zip(records, scored, strict=True)]
    return {**row.row, **ours, "prompt_token_ids": list(row.token_ids), "rollouts": records}


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """All of them or no file; values that JSON does not have, as Parquet may, become text."""
    with whole(path) as place, place.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)
