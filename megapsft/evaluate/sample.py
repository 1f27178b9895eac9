"""Responses to problems, as many as are missing: asked of an engine, written as they come, never asked for twice."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megapsft.evaluate.benchmark import Problem
from megapsft.evaluate.engine import Opened
from megapsft.evaluate.journal import Journal
from megapsft.rollout.base import Request, Rollout, Sampling

SYNC_SECONDS = 1.0

Advance = Callable[[int, int], None]  # responses, tokens


@dataclass(frozen=True)
class Unit:
    """What one line of the journal holds: responses `number`, ..., `number + count - 1` to the prompt of a row."""

    row: int
    number: int
    count: int


def units(problems: Sequence[Problem], n: int, each: int) -> list[Unit]:
    """n responses to each problem, `each` of them in a unit; a prompt that several rows have goes on counting.

    Args:
        each: divides n.
    """
    seen: Counter[tuple[int, ...]] = Counter()
    found = []
    for row, problem in enumerate(problems):
        first = seen[problem.token_ids]
        found += [Unit(row, number, each) for number in range(first, first + n, each)]
        seen[problem.token_ids] += n
    return found


def fill(
    journal: Journal,
    problems: Sequence[Problem],
    wanted: Sequence[Unit],
    opened: Opened,
    sampling: Sampling,
    to_record: Callable[[Unit, Sequence[Rollout]], Mapping[str, Any]],
    advance: Advance = lambda responses, tokens: None,
) -> None:
    """Ask the engine for the units that the journal has not, and write each when its last response is there.

    An engine in this process answers `opened.batch_size` requests at a time, cut as they would be if nothing were there yet; one
    outside has them all at once.

    Args:
        to_record: the line of a unit.
        advance: called with each response that comes.
    """
    for batch in _batches(wanted, opened.batch_size):
        batch = [unit for unit in batch if (unit.row, unit.number) not in journal.done]
        if batch:
            _ask(journal, problems, batch, opened, sampling, to_record, advance)
            journal.sync()


def _ask(
    journal: Journal,
    problems: Sequence[Problem],
    batch: Sequence[Unit],
    opened: Opened,
    sampling: Sampling,
    to_record: Callable[[Unit, Sequence[Rollout]], Mapping[str, Any]],
    advance: Advance,
) -> None:
    requests, owner = [], []
    for place, unit in enumerate(batch):
        numbers = range(unit.number, unit.number + unit.count)
        requests += [Request(prompt_ids=problems[unit.row].token_ids, number=number) for number in numbers]
        owner += [(place, offset) for offset in range(unit.count)]
    waiting: dict[int, dict[int, Rollout]] = {place: {} for place in range(len(batch))}
    synced = time.monotonic()

    def arrived(index: int, rollout: Rollout) -> bool:
        """One response; never enough."""
        nonlocal synced
        place, offset = owner[index]
        waiting[place][offset] = rollout
        advance(1, len(rollout.response_ids))
        if len(waiting[place]) == batch[place].count:
            whole = waiting.pop(place)
            journal.write(to_record(batch[place], [whole[offset] for offset in sorted(whole)]))
            if time.monotonic() - synced > SYNC_SECONDS:
                journal.sync()
                synced = time.monotonic()
        return False

    if opened.streams:
        opened.engine.generate(requests, sampling, arrived)
        return
    for index, rollout in enumerate(opened.engine.generate(requests, sampling)):
        arrived(index, rollout)


def _batches(wanted: Sequence[Unit], size: int | None) -> Iterator[Sequence[Unit]]:
    """Runs of units with at most `size` requests, of one unit at least; all at once where that is None."""
    if size is None:
        yield wanted
        return
    batch: list[Unit] = []
    for unit in wanted:
        if batch and sum(one.count for one in batch) + unit.count > size:
            yield batch
            batch = []
        batch.append(unit)
    yield batch


def rollout_of(record: Mapping[str, Any], prompt_ids: Sequence[int]) -> Rollout:
    """What `train.rollout_record` wrote; without log-probabilities where it had none."""
    return Rollout(
        prompt_ids=tuple(prompt_ids),
        response_ids=tuple(record["token_ids"]),
        rollout_logprobs=tuple(record.get("logprobs", ())),
        finish_reason=record["finish_reason"],
        weight_version=record["weight_version"],
    )


@contextmanager
def open_progress(shown: bool, text: str, total: int, done: int) -> Iterator[Advance]:
    """A bar of responses with tokens a second, on stderr; where that is a file, its end only."""
    if not shown:
        yield lambda responses, tokens: None
        return
    began, tokens_done = time.monotonic(), 0
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(text, total=total, completed=done, rate="")

        def advance(responses: int, tokens: int) -> None:
            nonlocal tokens_done
            tokens_done += tokens
            rate = tokens_done / max(time.monotonic() - began, 1e-9)
            progress.update(task, advance=responses, rate=f"{rate:,.0f} tok/s")

        yield advance
