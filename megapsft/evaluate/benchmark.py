"""Problems with the answers that responses are measured by, from files whose columns are called what they are called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapsft.config import ColumnsConfig
from megapsft.data.chat_template import ChatTemplate
from megapsft.data.rows import Prompt, parse_prompt, read_whole_records
from megapsft.errors import Refused

# the first that all rows have counts
PROMPTS = ("problem", "question", "prompt", "query", "instruction")
REFERENCES = ("reference", "final_answer", "answer", "ground_truth", "expected_answer", "target", "solution")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One row of the file."""

    prompt: Prompt  # text or chat messages
    token_ids: tuple[int, ...]  # of the prompt, up to where the response begins
    reference: str | None  # the right answer, or a solution that ends with it
    row: Mapping[str, Any]  # as it stands in the file
    source: str  # "file:line"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    name: str  # of the file, without its suffix
    problems: tuple[Problem, ...]

    @property
    def longest_prompt(self) -> int:
        """Tokens."""
        return max(len(problem.token_ids) for problem in self.problems)


def load_benchmark(
    path: str | Path,
    template: ChatTemplate,
    *,
    limit: int | None = None,
    prompt_column: str | None = None,
    reference_column: str | None = None,
    system_prompt: str | None = None,
    needs_reference: bool = True,
) -> Benchmark:
    """All problems of a .jsonl or .parquet, or the first `limit`, tokenised.

    Args:
        prompt_column: default: the first of PROMPTS that all rows have.
        reference_column: default: the first of REFERENCES that all rows have; numbers are taken as they are written.
        system_prompt: put before prompts that have no system turn.
        needs_reference: False where nothing is measured by one: then a file without such a column has none.

    Raises:
        Refused: what `read_records`, `parse_prompt` and `ChatTemplate` refuse; a column that is not there, with those that are; a
            reference that is blank or neither text nor number.
    """
    if limit is not None and limit < 1:
        raise Refused(f"limit={limit}", "must be 1 or more", "leave it out for all problems")
    records = read_whole_records(path, ColumnsConfig(), (), (), limit)
    prompt = _column(path, [row for _, row in records], prompt_column, PROMPTS, "prompt")
    reference = None
    if needs_reference or reference_column is not None:
        reference = _column(path, [row for _, row in records], reference_column, REFERENCES, "reference")
    sources = [source for source, _ in records]
    prompts = [parse_prompt(row[prompt], f"{source}: column {prompt!r}") for source, row in records]
    encoded = template.encode_prompts(prompts, sources, system_prompt)
    problems = [
        Problem(
            prompt=text,
            token_ids=tuple(ids),
            reference=None if reference is None else _reference(row[reference], f"{source}: column {reference!r}"),
            row=row,
            source=source,
        )
        for text, ids, (source, row) in zip(prompts, encoded, records, strict=True)
    ]
    return Benchmark(name=Path(path).stem, problems=tuple(problems))


def _column(path: str | Path, rows: list[dict[str, Any]], given: str | None, known: Iterable[str], what: str) -> str:
    """The column that holds the prompt or the reference: the one that was asked for, or the first known one."""
    common = [name for name in rows[0] if all(row.get(name) is not None for row in rows)]
    for name in known if given is None else (given,):
        if name in common:
            return name
    columns = ", ".join(dict.fromkeys(str(name) for row in rows for name in row)) or "none"
    if given is not None:
        raise Refused(f"--{what}-column {given}", f"is not in every row of {path}", f"its columns are {columns}")
    rule = f"has no column for the {what} that all rows fill: {', '.join(known)}"
    raise Refused(str(path), rule, f"name it with --{what}-column; its columns are {columns}")


def _reference(value: Any, at: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Refused(at, f"is a {type(value).__name__}", "write the answer as a string or a number")
    if not str(value).strip():
        raise Refused(at, "is blank", "fill it, or delete the row")
    return str(value)
