"""What models think of the same responses, token by token, and what follows from it. Plain numbers: no model is needed.

With p the probability of a token of the response in its place:

    shift      p_tuned - p_base, of each token (SRFT, Fig. 2)
    distance   of a model to a reference: the mean over responses of the mean over their tokens of |p - p_reference|;
               0 to itself, at most 1 (SRFT, Fig. 3 and appendix E, which leaves open which distance it is)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megapsft.errors import Refused

FORMAT = "megapsft compare 1"


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The T tokens of all responses, one response behind the other, as one model sees them."""

    name: str  # of a run or a folder; those of the same name are one path, in their order
    path: str
    logprobs: np.ndarray  # [T] fp64, nats, of the token of the response
    entropy: np.ndarray  # [T] fp64, nats, over the full vocabulary
    ranks: np.ndarray  # [T] int64, 1 where no word is likelier
    kl: np.ndarray | None = None  # [T] fp64, nats: KL(model || base) over the full vocabulary; None of the base
    kl_of_base: np.ndarray | None = None  # [T] the same of KL(base || model)

    @property
    def probabilities(self) -> np.ndarray:
        """[T]."""
        return np.exp(self.logprobs)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several models on the same responses."""

    data: str  # the file
    sources: tuple[str, ...]  # of each response, "file:line"
    lengths: tuple[int, ...]  # tokens of each response
    token_ids: np.ndarray  # [T] int64
    words: Mapping[int, str]  # token id -> its text
    base: Seen
    tuned: tuple[Seen, ...]
    references: tuple[Seen, ...] = ()  # beside the base, which is one too

    def shift(self, model: Seen) -> np.ndarray:
        """[T] p_model - p_base."""
        return model.probabilities - self.base.probabilities

    def response(self, number: int) -> slice:
        """Where the tokens of a response are."""
        start = sum(self.lengths[:number])
        return slice(start, start + self.lengths[number])

    def distance(self, model: Seen, reference: Seen) -> float:
        """Mean over responses of the mean over tokens of |p_model - p_reference|, as above."""
        away = np.abs(model.probabilities - reference.probabilities)
        return float(np.mean([away[self.response(number)].mean() for number, n in enumerate(self.lengths) if n]))


@dataclass(frozen=True)
class Word:
    """A word of the vocabulary, over all its places in the responses."""

    token_id: int
    text: str
    count: int
    mean: float  # of what is asked about


def by_word(comparison: Comparison, values: np.ndarray, least: int = 1) -> list[Word]:
    """The mean of `values` [T] of each word that occurs `least` times or more, smallest first: no word wins by its number."""
    ids, inverse, counts = np.unique(comparison.token_ids, return_inverse=True, return_counts=True)
    means = np.bincount(inverse, values, len(ids)) / counts
    words = [
        Word(int(one), comparison.words[int(one)], int(count), float(mean))
        for one, count, mean in zip(ids, counts, means, strict=True)
        if count >= least
    ]
    return sorted(words, key=lambda word: (word.mean, word.token_id))


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Plain values, with everything in it; `from_json` reads them."""
    models = {"tuned": comparison.tuned, "references": comparison.references}
    return {
        "format": FORMAT,
        "data": comparison.data,
        "sources": list(comparison.sources),
        "lengths": list(comparison.lengths),
        "token_ids": comparison.token_ids.tolist(),
        "words": {str(one): text for one, text in comparison.words.items()},
        "base": _plain(comparison.base),
        **{kind: [_plain(seen) for seen in several] for kind, several in models.items()},
    }


def from_json(content: Mapping[str, Any], file: str) -> Comparison:
    """As `to_json` wrote it.

    Args:
        file: where it lay, for messages.

    Raises:
        Refused: something else.
    """
    if content.get("format") != FORMAT:
        raise Refused(file, "is not what `megapsft compare --json` writes", "write it again")
    return Comparison(
        data=content["data"],
        sources=tuple(content["sources"]),
        lengths=tuple(content["lengths"]),
        token_ids=np.array(content["token_ids"], dtype=np.int64),
        words={int(one): text for one, text in content["words"].items()},
        base=_seen(content["base"]),
        tuned=tuple(map(_seen, content["tuned"])),
        references=tuple(map(_seen, content["references"])),
    )


def _plain(seen: Seen) -> dict[str, Any]:
    """Numbers in the fewest digits that give the same fp32."""
    columns = {"logprobs": seen.logprobs, "entropy": seen.entropy, "kl": seen.kl, "kl_of_base": seen.kl_of_base}
    short = {name: None if values is None else _short(values) for name, values in columns.items()}
    return {"name": seen.name, "path": seen.path, "ranks": seen.ranks.tolist(), **short}


def _short(values: Sequence[float]) -> list[float]:
    return [float(str(x)) for x in np.asarray(values, dtype=np.float32)]


def _seen(plain: Mapping[str, Any]) -> Seen:
    names = ("logprobs", "entropy", "kl", "kl_of_base")
    columns = {name: None if plain[name] is None else np.array(plain[name]) for name in names}
    return Seen(name=plain["name"], path=plain["path"], ranks=np.array(plain["ranks"], dtype=np.int64), **columns)


__all__ = ["Comparison", "Seen", "Word", "by_word", "from_json", "to_json"]
