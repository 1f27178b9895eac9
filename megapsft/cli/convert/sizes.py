"""Sizes as they are typed, such as 600MiB."""

from __future__ import annotations


def memory_of(text: str | None) -> int | None:
    """Bytes; None where nothing was said."""
    return None if text is None else size_of(text)


def size_of(text: str) -> int:
    """Bytes.

    Raises:
        Refused: what is no size.
    """
    from megapsft.checkpoint.convert.memory import parse_size

    return parse_size(text)
