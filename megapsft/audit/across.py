"""What may be wrong with rows taken together: repeats, answers that differ, problems of the evaluation, outliers.

A further rule is a further function under `@rule_across(...)`, which yields the number of a row and a sentence.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from megapsft.audit.rows import AuditedRow
from megapsft.audit.rule import Rule, rules_of
from megapsft.audit.rules import last_turn, responses, words
from megapsft.audit.shingles import Contained, near_pairs
from megapsft.data.chat_template import ChatTemplate
from megapsft.rewards.answer import final_answer

NEAR = 0.8  # Jaccard index from which rows are near
CONTAINED = 0.9  # part of an evaluation's problem that is in a prompt, from which it counts as in there
MOST_NEAR = 200_000  # rows that are looked at for near duplicates
OUTLIER = 8  # times the median length
FEW = 20  # rows: too few to say what is usual


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What is kept of a row when it has been looked at."""

    number: int
    text: str  # everything that it says
    asked: str  # the last turn of the prompt
    prompt: bytes  # digest of all turns
    whole: bytes  # digest of `text`, and of responses that are token ids
    answers: tuple[tuple[str, str], ...]  # (what is compared, what it says): equal keys should say the same
    tokens: int  # of its longest sequence


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A problem of an evaluation."""

    source: str  # "file:line"
    text: str


@dataclass(frozen=True, kw_only=True)
class Together:
    """What rules know: the rows in their order, and the problems that they are evaluated on."""

    rows: Sequence[Summary]
    evaluation: Sequence[Problem] = ()
    advance: Callable[[int], None] = lambda done: None


FindAcross = Callable[[Together], Iterator[tuple[int, str]]]
RULES_ACROSS: dict[Rule, FindAcross] = {}
rule_across = rules_of(RULES_ACROSS)


def summarise(row: AuditedRow, template: ChatTemplate) -> Summary:
    """Prompts that are token ids are spelt out."""
    texts = [text for _, text in words(row)]
    asked = last_turn(row)
    if isinstance(row.prompt, list) and isinstance(row.prompt[0], int):
        asked = template.spell(row.prompt)
        texts = [asked, *texts]
    said = dict(responses(row))
    in_ids = [str(sample.response.tolist()) for sample in row.samples if sample.text is None]
    turns = texts[: len(texts) - len(said)]
    return Summary(
        number=row.number,
        text="\n".join(texts),
        asked=asked,
        prompt=digest(turns),
        whole=digest([*texts, *in_ids]),
        answers=tuple(_answers(row, digest(turns).hex())),
        tokens=max((len(sample.token_ids) for sample in row.samples), default=0),
    )


def digest(texts: Sequence[str]) -> bytes:
    """Of texts that count as the same where they differ in blanks alone."""
    return hashlib.blake2b("\n".join(map(as_written, texts)).encode("utf-8", "replace"), digest_size=12).digest()


def as_written(text: str) -> str:
    """With single blanks."""
    return " ".join(text.split())


def _answers(row: AuditedRow, prompt: str) -> Iterator[tuple[str, str]]:
    said = dict(responses(row))
    if row.reference is not None:
        yield prompt, plain(final_answer(row.reference) or row.reference)
    elif "demonstration" in said and final_answer(said["demonstration"]):
        yield prompt, plain(final_answer(said["demonstration"]))
    if "chosen" in said and "rejected" in said:
        pair = sorted(as_written(said[side]) for side in ("chosen", "rejected"))
        yield f"{prompt} {digest(pair).hex()}", as_written(said["chosen"])
    for sample in row.samples:
        if sample.name.startswith("rollout"):
            yield f"{prompt} {digest([str(sample.response.tolist())]).hex()}", f"reward {sample.reward:g}"


def plain(answer: str) -> str:
    """Without what answers are decorated with: 1,000 is 1000, and $5 is 5."""
    return re.sub(r"[\s,$]", "", answer)


@rule_across("duplicate", "The row says what an earlier one says.", "Take it out, unless it is to count twice.")
def duplicate(together: Together) -> Iterator[tuple[int, str]]:
    first: dict[bytes, int] = {}
    for row in together.rows:
        earlier = first.setdefault(row.whole, row.number)
        if earlier != row.number:
            yield row.number, f"as row {earlier}"


@rule_across(
    "near-duplicate",
    f"Row and an earlier one ask with the same numbers, and share {NEAR:.0%} of their runs of five words and signs, or more.",
    "Keep one of them.",
)
def near_duplicate(together: Together) -> Iterator[tuple[int, str]]:
    different: dict[bytes, Summary] = {}
    for row in together.rows[:MOST_NEAR]:
        different.setdefault(row.whole, row)
    rows = list(different.values())
    texts, questions = [row.text for row in rows], [row.asked for row in rows]
    for later, earlier, index in near_pairs(texts, questions, NEAR, together.advance):
        yield rows[later].number, f"{index:.0%} of row {rows[earlier].number}"


@rule_across(
    "overlap",
    "The prompt holds a problem of an evaluation: its figures would say too much.",
    "Take the row out, or evaluate on other problems.",
)
def overlap(together: Together) -> Iterator[tuple[int, str]]:
    if not together.evaluation:
        return
    index = Contained([problem.text for problem in together.evaluation])
    for row in together.rows:
        found = index.most(row.asked)
        if found is not None and found[1] >= CONTAINED:
            yield row.number, f"{found[1]:.0%} of {together.evaluation[found[0]].source}"


@rule_across(
    "conflict",
    "The same prompt has another answer in an earlier row, or the same response another rank or reward.",
    "Find out which is right.",
)
def conflict(together: Together) -> Iterator[tuple[int, str]]:
    known: dict[str, tuple[int, str]] = {}
    for row in together.rows:
        for key, says in row.answers:
            earlier, said = known.setdefault(key, (row.number, says))
            if said != says:
                yield row.number, f"{brief(says)!r}, and in row {earlier} {brief(said)!r}"
                break


def brief(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


@rule_across(
    "outlier",
    f"The row is more than {OUTLIER} times as long as the median.",
    "Look at it: rows that were joined, or output that repeats itself.",
)
def outlier(together: Together) -> Iterator[tuple[int, str]]:
    lengths = [row.tokens for row in together.rows if row.tokens]
    if len(lengths) < FEW:
        return
    usual = median(lengths)
    for row in together.rows:
        if row.tokens > OUTLIER * usual:
            yield row.number, f"{row.tokens} tokens; the median is {usual:g}"


__all__ = ["RULES_ACROSS", "Problem", "Summary", "Together", "summarise"]
