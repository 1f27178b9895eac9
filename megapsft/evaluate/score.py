"""What responses to a benchmark are worth, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megapsft.data.chat_template import ChatTemplate
from megapsft.errors import Refused
from megapsft.evaluate.benchmark import Problem
from megapsft.evaluate.pass_at_k import average_at_n, over_problems, pass_at_k
from megapsft.rewards.sum import Sum
from megapsft.rollout.base import Rollout
from megapsft.train.rollout_record import response_of

KS = (1, 8, 32)  # of pass@k, where nothing else is asked for


@dataclass(frozen=True, kw_only=True)
class Result:
    """Of each problem and each of its responses, in their order."""

    benchmark: str
    scores: tuple[tuple[float, ...], ...]  # 1 is right
    lengths: tuple[tuple[int, ...], ...]  # tokens
    unfinished: tuple[tuple[bool, ...], ...]  # cut at the limit of tokens
    failures: tuple[tuple[bool, ...], ...]  # a verifier was late, ended or raised, and its part counts 0

    @property
    def n(self) -> int:
        """Responses to each problem; the fewest, where they differ."""
        return min(map(len, self.scores))


def score(
    benchmark: str, problems: Sequence[Problem], rollouts: Sequence[Sequence[Rollout]], template: ChatTemplate, rewards: Sum
) -> Result:
    """Reward every response.

    Args:
        rollouts: of each problem those of its responses, one at least.

    Raises:
        Refused: as the rewards do; a problem without responses.
    """
    for problem, of_problem in zip(problems, rollouts, strict=True):
        if not of_problem:
            raise Refused(problem.source, "has no responses", "sample them, or leave the problem out")
    pairs = list(zip(problems, rollouts, strict=True))
    responses = [response_of(p, rollout, number, template) for p, some in pairs for number, rollout in enumerate(some, start=1)]
    scored = iter(rewards(responses))
    by_problem = [[next(scored) for _ in of_problem] for of_problem in rollouts]
    failed = [[any(part.failure is not None for part in one.parts.values()) for one in some] for some in by_problem]
    return Result(
        benchmark=benchmark,
        scores=tuple(tuple(one.total for one in some) for some in by_problem),
        lengths=tuple(tuple(len(rollout.response_ids) for rollout in some) for some in rollouts),
        unfinished=tuple(tuple(rollout.finish_reason != "stop" for rollout in some) for some in rollouts),
        failures=tuple(map(tuple, failed)),
    )


def summarise(result: Result, ks: Sequence[int] | None = None) -> dict[str, float]:
    """Metrics of one benchmark, each a mean over problems of the mean over responses; standard errors are over problems.

    evaluate/<benchmark>/avg, /avg_se: of the score; /pass@k, /pass@k_se; /length: tokens of a response; /unfinished: share that
    was cut; /failures: responses whose verifier failed, a number.

    Args:
        ks: of pass@k; those above `result.n` are left out. Default: KS.
    """
    avg = average_at_n(result.scores)
    found = {"avg": avg.value, "avg_se": avg.standard_error}
    for k in KS if ks is None else ks:
        if k <= result.n:
            passed = pass_at_k(result.scores, k)
            found |= {f"pass@{k}": passed.value, f"pass@{k}_se": passed.standard_error}
    found["length"] = _mean(result.lengths)
    found["unfinished"] = _mean(result.unfinished)
    found["failures"] = float(sum(map(sum, result.failures)))
    return {f"evaluate/{result.benchmark}/{key}": value for key, value in found.items()}


def _mean(values: Sequence[Sequence[float]]) -> float:
    return over_problems([math.fsum(of_problem) / len(of_problem) for of_problem in values]).value
