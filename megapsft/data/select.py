"""Which rollouts of a prompt are worth imitating: rejection sampling, before supervised fine-tuning on what is kept."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def rft(rewards: Sequence[float], threshold: float = 1.0) -> list[bool]:
    """All rollouts of a group with reward >= threshold.

    Source: Scaling Relationship on Learning Mathematical Reasoning with LLMs (Yuan et al., 2023), section 3.3.

    Example:
        >>> rft([1.0, 0.0, 1.0])
        [True, False, True]
    """
    return [reward >= threshold for reward in rewards]


def raft(rewards: Sequence[float]) -> list[bool]:
    """The rollout of a group with the highest reward, the first on ties.

    Source: RAFT: Reward rAnked FineTuning (Dong et al., TMLR 2023), Algorithm 1.

    Example:
        >>> raft([0.4, 0.9, 0.9])
        [False, True, False]
    """
    best = max(range(len(rewards)), key=lambda i: rewards[i])
    return [i == best for i in range(len(rewards))]


def first_of_each(kept: Sequence[bool], responses: Sequence[Hashable]) -> list[bool]:
    """Of those that are kept, the first of each response.

    Example:
        >>> first_of_each([True, True, True], ["a", "b", "a"])
        [True, True, False]
    """
    seen: set[Hashable] = set()
    first = []
    for flag, response in zip(kept, responses, strict=True):
        first.append(flag and response not in seen)
        if flag:
            seen.add(response)
    return first
