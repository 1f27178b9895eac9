"""Responses to every prompt of a file, into a file that can be trained on; what is there already is not asked for again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megapsft.config import RolloutConfig
from megapsft.data.chat_template import ChatTemplate
from megapsft.errors import Refused
from megapsft.evaluate.benchmark import Benchmark, Problem
from megapsft.evaluate.engine import Dtype, check_room, open_engine, weights_digest
from megapsft.evaluate.journal import Journal
from megapsft.evaluate.sample import Unit, fill, open_progress, units
from megapsft.rewards.registry import build_reward, build_rewards
from megapsft.rollout.base import Rollout, Sampling
from megapsft.train.rollout_record import group_record, response_of

OURS = ("row", "number", "prompt_token_ids", "rollouts")  # columns that are written beside those of the data


@dataclass(frozen=True)
class Written:
    prompts: int
    responses: int
    resumed: int  # of the responses: they were there already


def identity(
    model: Path, benchmark: Benchmark, n: int, sampling: Sampling, engine: str, dtype: Dtype, rewards: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """All that decides which responses there are and what is written of them."""
    digest = hashlib.blake2b(digest_size=16)
    for problem in benchmark.problems:
        digest.update(np.array([len(problem.token_ids), *problem.token_ids], dtype="<i8").tobytes())
    return {
        "n": n,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        "seed": sampling.seed,
        "engine": engine,
        "dtype": dtype,
        "rewards": [dict(entry) for entry in rewards],
        "problems": len(benchmark.problems),
        "prompts": digest.hexdigest(),
        "weights": weights_digest(model),
    }


def rollout(
    model: Path,
    data: Benchmark,
    template: ChatTemplate,
    out: Path,
    *,
    n: int,
    sampling: Sampling,
    options: RolloutConfig,
    dtype: Dtype,
    rewards: Sequence[Mapping[str, Any]] = (),
    progress: bool = True,
) -> Written:
    """Write a line for each prompt when its n responses are there: the row of the data, with `prompt_token_ids` and `rollouts`.

    Args:
        options: which engine, and how it runs.
        rewards: entries as in the config; what they sum to is each rollout's `reward`. None: they have none.

    Raises:
        Refused: what `Journal`, `open_engine` and the rewards refuse; prompts without room; columns called as those written.
    """
    check_room(model, data.longest_prompt, sampling.max_tokens)
    check_n(n, sampling)
    for entry in rewards:
        build_reward(entry)
    for problem in data.problems:
        _check_row(problem)
    wanted = units(data.problems, n, n)
    with Journal(out, identity(model, data, n, sampling, options.engine, dtype, rewards)) as journal, ExitStack() as stack:
        resumed = len(journal.done) * n
        if len(journal.done) < len(wanted):
            opened = stack.enter_context(open_engine(model, options, dtype, out.with_suffix(".servers")))
            scoring = stack.enter_context(build_rewards(rewards)) if rewards else None
            advance = stack.enter_context(open_progress(progress, out.name, len(wanted) * n, resumed))

            def to_record(unit: Unit, rollouts: Sequence[Rollout]) -> dict[str, Any]:
                problem, scored = data.problems[unit.row], None
                if scoring is not None:
                    numbered = enumerate(rollouts, start=1)
                    scored = scoring([response_of(problem, one, number, template) for number, one in numbered])
                return group_record(problem, rollouts, scored, template, row=unit.row, number=unit.number)

            fill(journal, data.problems, wanted, opened, sampling, to_record, advance)
    return Written(len(wanted), len(wanted) * n, resumed)


def check_n(n: int, sampling: Sampling) -> None:
    """Refuse no response, and several that would be one."""
    if n < 1:
        raise Refused(f"n={n}", "must be 1 or more", "use n=8")
    if n > 1 and sampling.temperature == 0:
        raise Refused(f"n={n}", "would be the same response again and again where temperature=0", "use n=1, or temperature=0.7")


def _check_row(problem: Problem) -> None:
    for name in OURS:
        if name in problem.row:
            raise Refused(f"{problem.source}: column {name!r}", "is called as one that is written", "rename it")
    try:
        json.dumps(problem.row, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise Refused(problem.source, f"cannot be written as JSON ({error})", "leave the column out, or make it text") from None
