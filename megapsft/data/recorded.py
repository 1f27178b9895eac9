"""The file format of recorded rollouts: prompts with what a policy answered, how it was rewarded, and perhaps a demonstration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from megapsft.config import ColumnsConfig, DataConfig
from megapsft.data.rows import Prompt, check_columns, check_unicode, named, parse_logprobs, parse_prompt, parse_text, read_records
from megapsft.errors import Refused

FIELDS = ("response", "token_ids", "reward", "logprobs", "finish_reason", "weight_version")  # of a rollout; others are refused
MOST_TOKEN_ID = 2**31 - 1


@dataclass(frozen=True)
class Rollout:
    """One response of a policy as it stands in the file."""

    response: str | list[int]  # words, or token ids that are used as they are
    reward: float
    logprobs: np.ndarray | None  # fp32, of the response tokens, by the engine that sampled
    finished: bool  # False: cut at the engine's length limit, so that no terminator belongs to it
    weight_version: int | None  # of the policy that sampled
    source: str  # "file:line: rollout number"


@dataclass(frozen=True)
class RecordedPrompt:
    """One row of the file."""

    prompt: Prompt | list[int]  # text or chat messages, or token ids that are used as they are
    rollouts: tuple[Rollout, ...]
    demonstration: str | None
    demonstration_reward: float
    source: str  # "file:line"


def read_rollouts(config: DataConfig) -> list[RecordedPrompt]:
    """All rows of `config.path`, or the first `limit`: one prompt each,

        {"prompt": "..." or [{"role": ..., "content": ...}], "rollouts": [{"response": "...", "reward": 1.0}, ...]}

    with, if you have them, `prompt_token_ids` instead of the prompt, a `demonstration` and its `demonstration_reward`
    (default 1). A rollout has a `response` or its `token_ids` (which count where there are both), a finite `reward`, and if you
    have them `logprobs` (one for each response token), `finish_reason` ("stop" or "length") and `weight_version`.

    Raises:
        Refused: what `read_records` refuses; wrong types; unknown fields of a rollout; logprobs in some rollouts only; a system
            prompt before token ids.
    """
    columns = config.columns
    optional = ("prompt", "prompt_token_ids", "demonstration", "demonstration_reward")
    records = read_records(config.path, columns, ("rollouts",), optional, config.limit)
    rows = [parse_recorded(record, columns, source) for source, record in records]
    first = rows[0].rollouts[0]
    for row in rows:
        if config.system_prompt is not None and not is_text(row.prompt):
            rule = f"cannot be put before the token ids of {row.source}"
            raise Refused(f"data.system_prompt={config.system_prompt!r}", rule, "leave it out, or give prompts as text")
        for rollout in row.rollouts:
            if (rollout.logprobs is None) != (first.logprobs is None):
                having, lacking = (rollout, first) if first.logprobs is None else (first, rollout)
                raise Refused(lacking.source, f"has no logprobs, but {having.source} has", "record them for all, or for none")
    return rows


def parse_recorded(record: dict[str, Any], columns: ColumnsConfig, source: str) -> RecordedPrompt:
    """The prompt and its rollouts in a record that has the column `rollouts`."""
    if record.get(columns.prompt_token_ids) is not None:
        prompt = parse_token_ids(record[columns.prompt_token_ids], f"{source}: column {columns.prompt_token_ids!r}")
    else:
        check_columns(record, named(columns, ["prompt"]), source)
        prompt = parse_prompt(record[columns.prompt], f"{source}: column {columns.prompt!r}")
    at = f"{source}: column {columns.rollouts!r}"
    rollouts = record[columns.rollouts]
    if not isinstance(rollouts, list) or not rollouts:
        kind = "an empty list" if rollouts == [] else f"a {type(rollouts).__name__}"
        raise Refused(at, f"is {kind}", 'write [{"response": ..., "reward": ...}, ...]')
    if columns.demonstration == "demonstration" and "demostration" in record:  # a known misspelling in published data
        check_columns(record, named(columns, ["demonstration"]), source)
    demonstration = record.get(columns.demonstration)
    if demonstration is not None:
        demonstration = parse_text(demonstration, f"{source}: column {columns.demonstration!r}")
    reward, at = record.get(columns.demonstration_reward), f"{source}: column {columns.demonstration_reward!r}"
    if reward is not None and demonstration is None:
        raise Refused(at, "rewards a demonstration that the row has not", f"add the column {columns.demonstration!r}")
    return RecordedPrompt(
        prompt=prompt,
        rollouts=tuple(parse_rollout(r, f"{source}: rollout {number}") for number, r in enumerate(rollouts, start=1)),
        demonstration=demonstration,
        demonstration_reward=1.0 if reward is None else parse_reward(reward, at),
        source=source,
    )


def parse_rollout(rollout: Any, at: str) -> Rollout:
    """One entry of the column `rollouts`; null fields, which Parquet adds, are as good as absent."""
    if not isinstance(rollout, dict):
        raise Refused(at, f"is a {type(rollout).__name__}", 'write {"response": ..., "reward": ...}')
    rollout = {key: value for key, value in rollout.items() if value is not None}
    for key in rollout:
        if key not in FIELDS:
            raise Refused(f"{at}: {key!r}", "is not a field of a rollout", f"known: {', '.join(FIELDS)}")
    if not {"response", "token_ids"} & rollout.keys():
        raise Refused(at, "has neither a response nor token_ids", "give one of the two")
    response = rollout.get("response")
    if "token_ids" in rollout:  # words beside them are for people to read
        response = parse_token_ids(rollout["token_ids"], f"{at}: 'token_ids'")
    elif not isinstance(response, str):
        raise Refused(f"{at}: 'response'", f"is a {type(response).__name__}", "write a string")
    else:
        check_unicode(response, f"{at}: 'response'")
    if "reward" not in rollout:
        raise Refused(at, "has no reward", "give a number, such as `megapsft rollout --reward` writes")
    finish_reason, version = rollout.get("finish_reason", "stop"), rollout.get("weight_version")
    if finish_reason not in ("stop", "length"):
        raise Refused(f"{at}: finish_reason={finish_reason!r}", "is not known", "use stop or length; leave out what was aborted")
    if version is not None and (not isinstance(version, int) or isinstance(version, bool)):
        raise Refused(f"{at}: weight_version={version!r}", "is not an integer", "number the weights from 0, or leave it out")
    logprobs = rollout.get("logprobs")
    return Rollout(
        response=response,
        reward=parse_reward(rollout["reward"], f"{at}: reward"),
        logprobs=None if logprobs is None else parse_logprobs(logprobs, f"{at}: 'logprobs'"),
        finished=finish_reason == "stop",
        weight_version=version,
        source=at,
    )


def parse_token_ids(ids: Any, at: str) -> list[int]:
    """The token ids, at least one."""
    if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i <= MOST_TOKEN_ID for i in ids):
        raise Refused(at, "is not a list of token ids, at least one", "write integers of 0 or more")
    return ids


def parse_reward(reward: Any, at: str) -> float:
    """The reward as a float; JSON's NaN and Infinity are refused."""
    if not isinstance(reward, (int, float)) or isinstance(reward, bool) or not math.isfinite(reward):
        raise Refused(f"{at}={reward!r}", "is not a finite number", "give one, such as 1.0 or 0.0")
    return float(reward)


def is_text(prompt: Prompt | list[int]) -> bool:
    """Whether the prompt is text or chat messages, not token ids."""
    return isinstance(prompt, str) or isinstance(prompt[0], dict)
