"""Lists of numbers as they are typed."""

from __future__ import annotations

from megapsft.errors import Refused


def numbers_of(option: str, text: str) -> list[int]:
    """1,8,32 as [1, 8, 32].

    Raises:
        Refused: something else.
    """
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise Refused(f"{option} {text}", "is not a list of numbers", f"write {option} 1,8,32") from None
