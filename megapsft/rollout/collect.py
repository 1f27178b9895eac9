"""The groups of one step, out of what engines answer: which prompts are asked for, which answers are kept, what is left over."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megapsft.rollout.base import Engine, Request, Rollout, Sampling


@dataclass(frozen=True, kw_only=True)
class Answered:
    """All rollouts of one draw of the stream of prompts."""

    draw: int  # its place in the stream
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, kw_only=True)
class Stream:
    """How far the stream of prompts is: every draw below `drawn` has been trained or discarded, but for those that wait."""

    drawn: int = 0
    waiting: tuple[int, ...] = ()  # draws that were aborted, and come first in the next step


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What a step trains."""

    answered: tuple[Answered, ...]  # in the order of their draws
    stream: Stream  # behind the step
    partial: dict[int, tuple[Rollout | None, ...]] = field(default_factory=dict)  # of the draws that wait: what they have so far
    rounds: int = 0
    discarded: int = 0  # groups that dynamic sampling left out
    aborted: int = 0  # rollouts that were on their way when there was enough
    restarted: int = 0  # rollouts of earlier steps that had become too old to be gone on with


def collect(
    engine: Engine,
    prompt_of: Callable[[int], Sequence[int]],
    before: Collected,
    *,
    groups: int,
    n: int,
    sampling: Sampling,
    oldest: int,
    oversample: float = 1.0,
    informative: Callable[[Sequence[Answered]], Sequence[bool]] | None = None,
    rounds: int = 1,
) -> Collected:
    """Ask for prompts until there are `groups` whole groups, or `rounds` are over.

    Every draw of the stream ends in exactly one of three ways: it is in `answered` of one step, it is discarded by
    `informative`, or it waits. With `oversample` above 1 a round asks for more groups than are wanted, takes those that are
    whole first and aborts the rest, which waits for the next step; there its rollouts, whole or partial, are gone on with where
    all their tokens are of weights `oldest` or younger, and sampled anew where not.

    Args:
        prompt_of: token ids of a draw.
        before: of the step before; the first has an empty one.
        n: rollouts of a group.
        informative: which groups teach something; None: all. Those that do not are discarded, and others asked for (DAPO).
    """
    partial, restarted = _young(before.partial, oldest)
    waiting, drawn = list(before.stream.waiting), before.stream.drawn
    kept: list[Answered] = []
    discarded = aborted = count = 0
    while len(kept) < groups and count < rounds:
        count += 1
        wanted = groups - len(kept)
        asked = math.ceil(wanted * oversample)
        draws, waiting = waiting[:asked], waiting[asked:]
        fresh = range(drawn, drawn + asked - len(draws))
        drawn, draws = fresh.stop, [*draws, *fresh]
        whole, rest = _ask(engine, prompt_of, draws, {d: partial.pop(d, (None,) * n) for d in draws}, wanted, sampling)
        aborted += sum(rollout is None or rollout.finish_reason == "abort" for have in rest.values() for rollout in have)
        partial |= rest
        waiting = sorted([*rest, *waiting])
        flags = [True] * len(whole) if informative is None else informative(whole)
        kept += [answered for answered, flag in zip(whole, flags, strict=True) if flag]
        discarded += len(whole) - sum(flags)
    return Collected(
        answered=tuple(sorted(kept, key=lambda answered: answered.draw)),
        stream=Stream(drawn=drawn, waiting=tuple(waiting)),
        partial=partial,
        rounds=count,
        discarded=discarded,
        aborted=aborted,
        restarted=restarted,
    )


def _young(
    partial: dict[int, tuple[Rollout | None, ...]], oldest: int
) -> tuple[dict[int, tuple[Rollout | None, ...]], int]:
    """What may be gone on with, and how many rollouts may not."""
    kept = {
        draw: tuple(r if r is not None and r.weight_version >= oldest else None for r in have) for draw, have in partial.items()
    }
    lost = sum(a is not None and b is None for draw in kept for a, b in zip(partial[draw], kept[draw], strict=True))
    return kept, lost


def _ask(
    engine: Engine,
    prompt_of: Callable[[int], Sequence[int]],
    draws: Sequence[int],
    have: dict[int, tuple[Rollout | None, ...]],
    wanted: int,
    sampling: Sampling,
) -> tuple[list[Answered], dict[int, tuple[Rollout | None, ...]]]:
    """(whole groups, at most `wanted`; what the other draws have so far)."""
    found = {draw: list(have[draw]) for draw in draws}
    places, requests = [], []
    for draw in draws:
        for number, rollout in enumerate(found[draw]):
            if rollout is None or rollout.finish_reason == "abort":
                places.append((draw, number))
                prompt = tuple(prompt_of(draw))
                requests.append(Request(prompt_ids=prompt, number=draw * len(found[draw]) + number, partial=rollout))
    missing = {draw: sum(r is None or r.finish_reason == "abort" for r in found[draw]) for draw in draws}
    done: list[int] = [draw for draw in draws if not missing[draw]]  # groups, in the order in which they became whole

    def enough(index: int, rollout: Rollout) -> bool:
        draw = places[index][0]
        if rollout.finish_reason != "abort":
            missing[draw] -= 1
            if not missing[draw]:
                done.append(draw)
        return len(done) >= wanted

    if len(draws) > wanted:
        rollouts = engine.generate(requests, sampling, enough)
        taken = done[:wanted]
    else:
        rollouts = engine.generate(requests, sampling)
        taken = list(draws)
    for (draw, number), rollout in zip(places, rollouts, strict=True):
        found[draw][number] = rollout if rollout.response_ids else None
    whole = [Answered(draw=draw, rollouts=tuple(found[draw])) for draw in sorted(taken)]
    return whole, {draw: tuple(found[draw]) for draw in draws if draw not in taken}


def resumed(stream: Stream, n: int) -> Collected:
    """As it stands behind a checkpoint, which keeps no partial rollouts: those that wait are sampled anew."""
    return Collected(answered=(), stream=stream, partial={draw: (None,) * n for draw in stream.waiting})


__all__ = ["Answered", "Collected", "Stream", "collect", "resumed"]
