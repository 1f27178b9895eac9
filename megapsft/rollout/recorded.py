"""Rollouts that were recorded before, as an engine: what it is asked for, it looks up."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from megapsft.errors import Refused
from megapsft.rollout.base import Request, Rollout, Sampling

Key = tuple[tuple[int, ...], int]  # ids of the prompt, number among its responses


class Recorded:
    """Answers from a JSONL with one prompt a row, such as `megapsft rollout` writes:

        {"prompt_token_ids": [...], "number": 0, "rollouts": [{"token_ids": [...], "logprobs": [...], ...}, ...]}

    The rollouts of a row are number `number` and those that follow of its prompt; where that is not said, they go on from the
    rows of the same prompt above. `finish_reason` is stop where it is not said, `weight_version` 0.

    Of the sampling options a shorter `max_tokens` and more `stop_token_ids` cut the recorded response, which gives what would
    have been sampled with them. The others are those of the recording, which are not known here.

    Raises:
        Refused: no such file, or a line that is not as above; names the line. Two responses with the same number.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._rollouts: dict[Key, Rollout] = {}
        self._next: dict[tuple[int, ...], int] = {}  # prompt -> one more than the largest of its numbers
        if not self.path.is_file():
            raise Refused(str(path), "is not a file", "name a JSONL of rollouts, such as `megapsft rollout` writes")
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                self._read(line, f"{path}:{number}")

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, enough: Callable[[int, Rollout], bool] | None = None
    ) -> list[Rollout]:
        """One rollout for each request, in their order.

        Raises:
            Refused: a response that was not recorded, was cut before `max_tokens`, or does not begin as the request's partial.
        """
        found: list[Rollout] = []
        done = False
        for index, request in enumerate(requests):
            rollout = self._look_up(request)
            if done:
                begun = replace(rollout, response_ids=(), rollout_logprobs=(), finish_reason="abort")
                found.append(begun if request.partial is None else request.partial)
                continue
            found.append(_cut(rollout, sampling, f"{self.path}: response number {request.number} to a prompt"))
            done = enough is not None and enough(index, found[-1])
        return found

    def load_weights(self, stream: Iterable[tuple[str, Tensor | None]], version: int) -> None:
        """Nothing: what was recorded keeps the version that sampled it. `stream` is not read."""

    def close(self) -> None:
        """Nothing was started."""

    def _look_up(self, request: Request) -> Rollout:
        key = tuple(map(int, request.prompt_ids)), request.number
        rollout = self._rollouts.get(key)
        if rollout is None:
            count = self._next.get(key[0], 0)
            rule = f"holds {count} responses to this prompt of {len(key[0])} tokens" if count else "does not hold this prompt"
            raise Refused(f"{self.path}: response number {request.number}", rule, "record it, or ask for what is there")
        begun = request.partial
        if begun is not None and rollout.response_ids[: len(begun.response_ids)] != begun.response_ids:
            rule = "is gone on with, but begins otherwise in the recording"
            raise Refused(f"{self.path}: response number {request.number}", rule, "begin it anew, without partial")
        return rollout

    def _read(self, line: bytes, at: str) -> None:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise Refused(at, f"is not a line of JSON ({error})", "write one JSON object a line, in UTF-8") from None
        if not isinstance(row, dict) or not isinstance(row.get("rollouts"), list):
            raise Refused(at, "has no list of rollouts", 'write {"prompt_token_ids": [...], "rollouts": [...]}')
        prompt_ids = _token_ids(row.get("prompt_token_ids"), f"{at}: prompt_token_ids")
        first = row.get("number")
        first = self._next.get(prompt_ids, 0) if first is None else _integer(first, f"{at}: number")
        for place, rollout in enumerate(row["rollouts"]):
            key = prompt_ids, first + place
            if key in self._rollouts:
                raise Refused(f"{at}: number {first + place}", "is there twice for its prompt", "remove one, or number them")
            self._rollouts[key] = _parse(rollout, prompt_ids, f"{at}: rollout {place + 1}")
        self._next[prompt_ids] = max(self._next.get(prompt_ids, 0), first + len(row["rollouts"]))


def _parse(rollout: Any, prompt_ids: tuple[int, ...], at: str) -> Rollout:
    if not isinstance(rollout, Mapping):
        raise Refused(at, f"is a {type(rollout).__name__}", 'write {"token_ids": [...], "logprobs": [...]}')
    response_ids = _token_ids(rollout.get("token_ids"), f"{at}: token_ids")
    logprobs = rollout.get("logprobs")
    numbers = isinstance(logprobs, list) and all(type(x) in (int, float) and math.isfinite(x) for x in logprobs)
    if not numbers or len(logprobs) != len(response_ids):
        rule = f"are not {len(response_ids)} numbers, one for each token"
        raise Refused(f"{at}: logprobs", rule, "record them; they are never made up")
    finish_reason = rollout.get("finish_reason") or "stop"
    if finish_reason not in ("stop", "length"):
        raise Refused(f"{at}: finish_reason={finish_reason!r}", "is not known", "use stop or length; leave out what was aborted")
    version = rollout.get("weight_version")
    return Rollout(
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        rollout_logprobs=tuple(np.array(logprobs, dtype=np.float32).tolist()),
        finish_reason=finish_reason,
        weight_version=0 if version is None else _integer(version, f"{at}: weight_version"),
    )


def _cut(rollout: Rollout, sampling: Sampling, at: str) -> Rollout:
    """As it would have been with these limits."""
    ids = rollout.response_ids[: sampling.max_tokens]
    stops = [place for place, token in enumerate(ids) if token in sampling.stop_token_ids]
    ids = ids[: stops[0] + 1] if stops else ids
    if len(ids) == len(rollout.response_ids):
        if rollout.finish_reason == "length" and not stops and len(ids) < sampling.max_tokens:
            rule = f"was cut after {len(ids)} tokens"
            raise Refused(f"{at} with max_tokens={sampling.max_tokens}", rule, f"use max_tokens={len(ids)}, or record it anew")
        return replace(rollout, finish_reason="stop") if stops else rollout
    reason = "stop" if stops else "length"
    return replace(rollout, response_ids=ids, rollout_logprobs=rollout.rollout_logprobs[: len(ids)], finish_reason=reason)


def _token_ids(ids: Any, at: str) -> tuple[int, ...]:
    if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise Refused(at, "is not a list of token ids, at least one", "write integers of 0 or more")
    return tuple(ids)


def _integer(value: Any, at: str) -> int:
    if type(value) is not int or value < 0:
        raise Refused(f"{at}={value!r}", "is not an integer of 0 or more", "write one, or leave it out")
    return value


__all__ = ["Recorded"]
