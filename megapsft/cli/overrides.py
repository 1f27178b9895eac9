"""The key=value arguments: they may stand anywhere, which argparse does not allow."""

from __future__ import annotations

OVERRIDES: list[str] = []  # those of the command that runs
TAKING = ("--vary", "--tuned", "--reference")  # options whose value may look like one


def take_overrides(arguments: list[str]) -> list[str]:
    """Put the overrides among `arguments` into OVERRIDES; returns the others."""
    taken = [
        _is_override(argument) and before not in TAKING for before, argument in zip(["", *arguments], arguments, strict=False)
    ]
    OVERRIDES[:] = [argument for argument, is_one in zip(arguments, taken, strict=True) if is_one]
    return [argument for argument, is_one in zip(arguments, taken, strict=True) if not is_one]


def _is_override(argument: str) -> bool:
    """`key=value`, and neither an option nor a path with an = in it."""
    key, equals, _ = argument.partition("=")
    return bool(equals) and not key.startswith("-") and "/" not in key
