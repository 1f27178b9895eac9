"""Which words are clipped: a cloud, as of PSFT's Fig. 8, and a table by how often they are of the times that they are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapsft.metrics.records import read_records
from megapsft.report.figure import Cloud, Grid, Token
from megapsft.report.words import spelt

LEAST = 5  # times that a word must be trained for its rate to say something
MOST = 60  # words of a cloud
ROWS = 15  # of the table
Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Clipped:
    """A word in one epoch."""

    text: str
    trained: int
    clipped: int

    @property
    def rate(self) -> float:
        """Share of the times that it was trained."""
        return self.clipped / self.trained


def read_counts(run: Path) -> Records:
    """The lines of RUN/tokens/counts.jsonl; none where the run kept no tokens."""
    file = run / "tokens/counts.jsonl"
    return read_records(file) if file.is_file() else []


def by_epoch(lines: Records) -> dict[int, list[Clipped]]:
    """Epoch, counted from 1 -> its words, most clipped first; a word in several lines of the epoch counts in all of them."""
    found: dict[int, dict[int, Clipped]] = {}
    for line in lines:
        words = found.setdefault(line["epoch"], {})
        for one, text, trained, clipped in zip(line["ids"], line["tokens"], line["trained"], line["clipped"], strict=True):
            before = words.get(one, Clipped(text, 0, 0))
            words[one] = Clipped(text, before.trained + trained, before.clipped + clipped)
    return {epoch: sorted(words.values(), key=lambda word: -word.clipped) for epoch, words in sorted(found.items())}


def cloud(run: str, epoch: int, words: Sequence[Clipped], name: str) -> Cloud:
    """The words that were clipped most often, in one epoch of a run."""
    shown = [word for word in words if word.clipped][:MOST]
    hover = "of the {} times that it was trained: {:.1%}"
    tokens = [Token(spelt(word.text), float(word.clipped), hover.format(f"{word.trained:,}", word.rate)) for word in shown]
    total, of = sum(word.clipped for word in words), sum(word.trained for word in words)
    note = f"{total:,} of {of:,} tokens were clipped in this epoch, {total / of:.2%}." if of else ""
    return Cloud(name=name, title=f"{run}: clipped tokens, epoch {epoch}", unit="times clipped", tokens=tokens, note=note)


def rates(run: str, epochs: Mapping[int, Sequence[Clipped]], name: str) -> Grid:
    """The words with the highest rate in the last epoch, and their rate in each: frequent words do not win by their number."""
    last = max(epochs)
    frequent = sorted((word for word in epochs[last] if word.trained >= LEAST), key=lambda word: (-word.rate, -word.trained))
    rate_of = {epoch: {word.text: word for word in words} for epoch, words in epochs.items()}
    rows = [
        [spelt(word.text), f"{word.trained:,}", f"{word.clipped:,}", *(_rate(rate_of[epoch].get(word.text)) for epoch in epochs)]
        for word in frequent[:ROWS]
    ]
    heading = ["token", f"trained in epoch {last}", "clipped", *(f"rate in epoch {epoch}" for epoch in epochs)]
    note = f"Of words that were trained {LEAST} times or more in epoch {last}; the rate is clipped over trained."
    return Grid(
        name=name, title=f"{run}: how often a token is clipped when it is trained", heading=heading, rows=rows,
        numbers=frozenset(range(1, len(heading))), note=note,
    )  # fmt: skip


def _rate(word: Clipped | None) -> str:
    return "–" if word is None else f"{word.rate:.1%}"


__all__ = ["Clipped", "by_epoch", "cloud", "rates", "read_counts"]
