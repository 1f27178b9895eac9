"""The key=value arguments: they may stand anywhere, which argparse does not allow."""

from __future__ import annotations

OVERRIDES: list[str] = []  # those of the command that runs


def take_overrides(arguments: list[str]) -> list[str]:
    """Put the overrides among `arguments` into OVERRIDES; returns the others."""
    OVERRIDES[:] = [argument for argument in arguments if _is_override(argument)]
    return [argument for argument in arguments if not _is_override(argument)]


def _is_override(argument: str) -> bool:
    """`key=value`, and neither an option nor a path with an = in it."""
    key, equals, _ = argument.partition("=")
    return bool(equals) and not key.startswith("-") and "/" not in key
