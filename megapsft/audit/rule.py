"""A rule of the audit, and how a function becomes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Find = TypeVar("Find", bound=Callable)


@dataclass(frozen=True, kw_only=True)
class Rule:
    name: str
    meaning: str
    remedy: str


def rules_of(found: dict[Rule, Find]) -> Callable[[str, str, str], Callable[[Find], Find]]:
    """The decorator `(name, meaning, remedy)` that makes a function one of these rules.

    Example:
        >>> RULES = {}
        >>> rule = rules_of(RULES)
        >>> @rule("empty", "The row says nothing.", "Take it out.")
        ... def empty(row): ...
    """

    def rule(name: str, meaning: str, remedy: str) -> Callable[[Find], Find]:
        def add(find: Find) -> Find:
            found[Rule(name=name, meaning=meaning, remedy=remedy)] = find
            return find

        return add

    return rule


__all__ = ["Rule", "rules_of"]
