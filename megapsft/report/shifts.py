"""What training did to the probabilities of tokens: where in a response, how much of it, and to which words (SRFT, Fig. 2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megapsft.report.figure import Grid, Heat, Histogram, Mark, Series, Token
from megapsft.report.words import spelt
from megapsft.train.comparison import Comparison, Seen, Word, by_word

BINS = 40
LEAST = 3  # occurrences of a word, for its mean to say something
ROWS = 10  # words that gained, and as many that lost
MOST = 600  # tokens of a response
UNIT = "shift of probability (no unit)"


def last_of_each(comparison: Comparison) -> list[Seen]:
    """The last model of each name: where a path ends."""
    return list({seen.name: seen for seen in comparison.tuned}.values())


def shift_histogram(comparison: Comparison, name: str = "shift") -> Histogram:
    """Shares of tokens by shift, of the last model of each name."""
    edges = np.linspace(-1, 1, BINS + 1)
    series = []
    for number, seen in enumerate(last_of_each(comparison), start=1):  # the base has the first colour
        shift = comparison.shift(seen)
        counts, _ = np.histogram(np.clip(shift, -1, 1), edges)
        series.append(Series(name=seen.name, values=(100 * counts / len(shift)).tolist(), colour=number))
    return Histogram(
        name=name, title="How far training moved the probabilities of tokens", x_label="p tuned − p base (no unit)",
        y_label="% of tokens", edges=edges.tolist(), series=series, limits=[Mark(0.0, "unchanged")], log_y=True,
    )  # fmt: skip


def heat(comparison: Comparison, seen: Seen, number: int, name: str) -> Heat:
    """One response, or the first of its tokens; colours have the same scale for every model and response of the comparison."""
    end = max(float(np.abs(comparison.shift(one)).max()) for one in comparison.tuned)
    where = comparison.response(number)
    base, tuned, shift = comparison.base.probabilities, seen.probabilities, comparison.shift(seen)
    tokens = [
        Token(
            comparison.words[int(comparison.token_ids[place])],
            float(shift[place]),
            f"p {base[place]:.3g} → {tuned[place]:.3g}, place {comparison.base.ranks[place]} → {seen.ranks[place]}, "
            f"entropy {comparison.base.entropy[place]:.2f} → {seen.entropy[place]:.2f} nats",
        )
        for place in range(where.start, min(where.stop, where.start + MOST))
    ]
    title = f"{seen.name}: {comparison.sources[number]}"
    note = f"The first {MOST} of {where.stop - where.start:,} tokens." if where.stop - where.start > MOST else ""
    return Heat(name=name, title=title, unit=UNIT, tokens=tokens, low=-end, high=end, note=note)


def words(comparison: Comparison, seen: Seen, name: str) -> Grid:
    """The words that gained and lost most, by the mean over their places: no word wins by being frequent."""
    ordered = by_word(comparison, comparison.shift(seen), LEAST)
    gained = [word for word in reversed(ordered) if word.mean > 0][:ROWS]
    lost = [word for word in ordered if word.mean < 0][:ROWS]
    rows = [cells for kind, some in (("gained", gained), ("lost", lost)) for cells in _cells(kind, some)]
    return Grid(
        name=name, title=f"{seen.name}: words that gained and lost most", heading=["", "token", "places", "mean shift"],
        rows=rows, numbers=frozenset({2, 3}), note=f"Of words with {LEAST} places or more in the responses.",
    )  # fmt: skip


def _cells(kind: str, some: Sequence[Word]) -> list[list[str]]:
    return [[kind, spelt(word.text), f"{word.count:,}", f"{word.mean:+.4f}"] for word in some]


__all__ = ["heat", "last_of_each", "shift_histogram", "words"]
