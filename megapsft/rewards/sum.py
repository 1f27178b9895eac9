"""Several rewards at once: their weighted sum, and each of them for the metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megapsft.rewards._base import Base, Part, Response
from megapsft.rewards._pool import Pool


@dataclass(frozen=True)
class Scored:
    """What a response is worth."""

    total: float  # sum of weight * value over the parts
    parts: Mapping[str, Part]  # by label


class Sum:
    """total = sum_i weight_i value_i over the rewards i, in their order. Holds their workers until `close`.

    Example:
        >>> with Sum({"format": Format(weight=0.1), "length": Length(soft_limit=4, price=0.5)}, Pool()) as rewards:
        ...     [scored] = rewards([Response(prompt="?", text="<think>.</think> 4", tokens=5, source="a.jsonl:1")])
        >>> scored.total
        -0.4
    """

    def __init__(self, rewards: Mapping[str, Base], pool: Pool):
        """`rewards` by their labels.

        Raises:
            Refused: a reward that cannot be computed whatever the response. The pool is closed then.
        """
        self.rewards = dict(rewards)
        self._pool = pool
        try:
            for reward in self.rewards.values():
                reward.check(pool)
        except BaseException:
            pool.close()
            raise

    def __call__(self, responses: Sequence[Response]) -> list[Scored]:
        """Of each response, in their order. May be called from several threads.

        Raises:
            Refused: as the rewards do.
        """
        columns = {label: reward(responses, self._pool) for label, reward in self.rewards.items()}
        rows = [{label: column[i] for label, column in columns.items()} for i in range(len(responses))]
        return [Scored(sum(self.rewards[label].weight * part.value for label, part in row.items()), row) for row in rows]

    def close(self) -> None:
        """End the workers."""
        self._pool.close()

    def __enter__(self) -> Sum:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def summary(scored: Sequence[Scored]) -> dict[str, float]:
    """Metrics of responses, one at least: the mean of each part before its weight, and how often a verifier failed.

    `reward/timeouts`, `reward/deaths` and `reward/errors` count parts that are 0 because their verifier was late, because its
    process ended (a crash, memory), or because it raised.
    """
    means = {f"reward/{label}": sum(one.parts[label].value for one in scored) / len(scored) for label in scored[0].parts}
    failures = [part.failure for one in scored for part in one.parts.values()]
    keys = {"reward/timeouts": "timeout", "reward/deaths": "died", "reward/errors": "error"}
    return means | {key: float(failures.count(failure)) for key, failure in keys.items()}


__all__ = ["Response", "Scored", "Sum", "summary"]
