"""Texts by their runs of words: which are nearly the same, without comparing all with all.

A shingle is a run of SIZE words and signs, lower case, without the blanks between them. Two texts are near where the Jaccard
index of their sets of shingles is high. Candidates come from signatures of least hashes in bands (MinHash; Broder, 1997;
Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, chapter 3), and each is then compared exactly: what is reported is near.
Of pairs with an index of 0.8 about one in 500 has no band in common, of those with 0.9 one in a million.

Texts whose numbers differ are different problems, however alike their words: they are never near.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

SIZE = 5  # words and signs
BANDS, ROWS = 20, 6  # found where one band is equal: with probability 1 - (1 - j^6)^20
MOST_WORDS = 2000  # of a text: what lies behind is not looked at
NUMBER = re.compile(r"\d+(?:\.\d+)?")
FEWEST = 5  # shingles: of fewer, a text is found in another only where that is all of it
WORD = re.compile(r"\w+|[^\w\s]")
_RANDOM = np.random.default_rng(20)
_FACTORS = _RANDOM.integers(0, 2**63, size=(BANDS * ROWS, 1), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_SHIFTS = _RANDOM.integers(0, 2**63, size=(BANDS * ROWS, 1), dtype=np.uint64)
_PRIME = np.uint64(0x9E3779B97F4A7C15)


def shingles(text: str) -> np.ndarray:
    """[n] uint64, ascending and each once: hashes of the runs of SIZE words, or of all words where there are fewer.

    Of no words there are none.
    """
    hashes = np.array([zlib.crc32(word.encode()) for word in WORD.findall(text.lower())[:MOST_WORDS]], dtype=np.uint64)
    if not len(hashes):
        return hashes
    size = min(SIZE, len(hashes))
    mixed = np.zeros(len(hashes) - size + 1, dtype=np.uint64)
    for place in range(size):
        mixed = (mixed ^ hashes[place : len(hashes) - size + 1 + place]) * _PRIME
        mixed ^= mixed >> np.uint64(29)
    return np.unique(mixed)


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Of two sets of shingles: how many are in both, of how many there are."""
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / max(len(one) + len(other) - both, 1)


def signature(found: np.ndarray) -> list[bytes]:
    """The bands of a set of shingles, at least one."""
    least = ((found[None, :] * _FACTORS + _SHIFTS) >> np.uint64(32)).min(axis=1).astype(np.uint32)
    return [band.tobytes() for band in least.reshape(BANDS, ROWS)]


def numbers(text: str) -> Counter[str]:
    """How often each number stands in the text; 1,000 is 1000."""
    return Counter(NUMBER.findall(re.sub(r"(?<=\d),(?=\d{3})", "", text)))


def near_pairs(
    texts: Sequence[str],
    questions: Sequence[str],
    threshold: float,
    advance: Callable[[int], None] = lambda done: None,
) -> Iterator[tuple[int, int, float]]:
    """(later, earlier, Jaccard index) for each text that is near to one before it: the nearest of the candidates.

    A text is compared with the first of each of its bands alone, so time is linear in the number of texts.

    Args:
        questions: one for each text; only where their numbers are the same are texts compared.
    """
    first: list[dict[bytes, int]] = [{} for _ in range(BANDS)]
    kept: list[np.ndarray] = []
    for number, (text, question) in enumerate(zip(texts, questions, strict=True)):
        own = shingles(text)
        kept.append(own)
        advance(1)
        if not len(own):
            continue
        same = repr(sorted(numbers(question).items())).encode()
        bands = zip(first, signature(own), strict=True)
        candidates = {table.setdefault(band + same, number) for table, band in bands} - {number}
        index, earlier = max(((jaccard(own, kept[other]), -other) for other in candidates), default=(0.0, 0))
        if index >= threshold:
            yield number, -earlier, index


class Contained:
    """Which of some texts are contained in another, by their shingles and their numbers."""

    def __init__(self, texts: Sequence[str]):
        self._numbers = [numbers(text) for text in texts]
        self._sizes: list[int] = []
        self._where: dict[int, list[int]] = {}
        for number, text in enumerate(texts):
            own = shingles(text)
            self._sizes.append(len(own))
            for value in own.tolist():
                self._where.setdefault(value, []).append(number)

    def most(self, text: str) -> tuple[int, float] | None:
        """(number, part of its shingles that are in `text`) of the text that is contained most; None where none has any."""
        own = shingles(text).tolist()
        hits: Counter[int] = Counter()
        for value in own:
            hits.update(self._where.get(value, ()))
        there = numbers(text)
        parts = {n: self._part(n, count, len(own)) for n, count in hits.items() if self._numbers[n] <= there}
        return max(parts.items(), key=lambda found: (found[1], -found[0]), default=None)

    def _part(self, number: int, both: int, other: int) -> float:
        size = self._sizes[number]
        return both / size if size >= FEWEST else both / (size + other - both)
