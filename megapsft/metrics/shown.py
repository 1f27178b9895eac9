"""What is shown beside curves: a picture, a table. Trackers get the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Picture:
    """A PNG in a file."""

    name: str
    png: Path


@dataclass(frozen=True)
class Table:
    """Cells as they are printed.

    Raises:
        ValueError: a row that is not as wide as the heading.

    Example:
        >>> print(Table("phases", ("phase", "nll"), [("train (PSFT)", "0.52→0.31")]).markdown())
        | phase | nll |
        | --- | ---: |
        | train (PSFT) | 0.52→0.31 |
    """

    name: str
    heading: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1  # columns, from the left, that are words and no numbers

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.heading):
                raise ValueError(f"{self.name}: a row of {len(row)} cells under a heading of {len(self.heading)}")

    def markdown(self) -> str:
        """With numbers to the right."""
        rule = ["---"] * self.texts + ["---:"] * (len(self.heading) - self.texts)
        return "".join(f"| {' | '.join(line)} |\n" for line in (self.heading, rule, *self.rows))


Shown = Picture | Table

__all__ = ["Picture", "Shown", "Table"]
