"""avg@n and pass@k of a benchmark, with standard errors. Arithmetic only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megapsft.errors import Refused


@dataclass(frozen=True)
class Estimate:
    """A mean over problems."""

    value: float
    standard_error: float  # nan where there is one problem only: nothing is known of others
    problems: int


def average_at_n(scores: Sequence[Sequence[float]]) -> Estimate:
    """avg@n: the mean over problems of the mean over each problem's responses.

    A problem counts the same however many responses it has. Standard error: see `over_problems`.

    Args:
        scores: of each problem those of its responses, one at least.

    Raises:
        Refused: no problem, a problem without responses, a score that is not finite.

    Example:
        >>> average_at_n([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
        Estimate(value=0.5, standard_error=0.2886..., problems=3)
    """
    _some(scores, 1)
    return over_problems([math.fsum(of_problem) / len(of_problem) for of_problem in scores])


def pass_at_k(scores: Sequence[Sequence[float]], k: int) -> Estimate:
    """pass@k: the mean over problems of the probability that one at least of k responses is right, without bias.

    A response is right where its score is 1. Standard error: see `over_problems`.

    Args:
        scores: of each problem those of its n responses; n may differ between problems.
        k: 1..the least n.

    Raises:
        Refused: as `average_at_n`; k outside of that range.

    Example:
        >>> pass_at_k([[1, 0, 0, 0], [0, 0, 0, 0]], 2)
        Estimate(value=0.25, standard_error=0.25, problems=2)
    """
    _some(scores, k)
    return over_problems([pass_probability(len(of_problem), sum(score == 1 for score in of_problem), k) for of_problem in scores])


def pass_probability(n: int, right: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the share of the k-subsets of n responses, c of them right, that hold a right one.

    In whole numbers up to the one division, so it is rounded once, also where it is near 0 or 1.

    Raises:
        Refused: not 0 <= right <= n, or k outside of 1..n: there is no unbiased estimate of more than was sampled.

    Source: Evaluating Large Language Models Trained on Code (Chen et al., 2021), Eq. 1.

    Example:
        >>> pass_probability(4, 1, 2)
        0.5
    """
    if not 0 <= right <= n:
        raise Refused(f"right={right}", f"must lie in 0..n={n}", "count the responses again")
    if not 1 <= k <= n:
        raise Refused(f"k={k}", f"must lie in 1..{n}, the responses of the problem", "sample more responses, or ask for less")
    every = math.comb(n, k)
    return (every - math.comb(n - right, k)) / every


def over_problems(values: Sequence[float]) -> Estimate:
    """Mean of one value a problem and its standard error, sqrt(sum (x - mean)^2 / (P (P - 1))).

    Problems are the clusters: responses to one problem are alike, so they are no independent trials, and the spread between
    problems holds that within them too. avg@n and pass@k are means over problems, so neither a delta method nor a bootstrap is
    needed: the bootstrap over problems gives this times sqrt((P - 1) / P).

    Source: Adding Error Bars to Evals (Miller, 2024), on clustered standard errors.
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, math.nan, 1)
    return Estimate(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count * (count - 1))), count)


def _some(scores: Sequence[Sequence[float]], k: int) -> None:
    if not scores:
        raise Refused("scores", "hold no problem", "give those of one at least")
    for problem, of_problem in enumerate(scores):
        if not of_problem:
            raise Refused(f"problem {problem}", "has no responses", "sample them, or leave the problem out")
        if not all(math.isfinite(score) for score in of_problem):
            raise Refused(f"problem {problem}", "has a score that is not finite", "score it again")
        if not 1 <= k <= len(of_problem):
            rule = f"must lie in 1..{len(of_problem)}, the responses of problem {problem}"
            raise Refused(f"k={k}", rule, "sample more responses, or ask for less")
