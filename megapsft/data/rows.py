"""Rows of a JSONL or Parquet file, by named columns; prompts and texts checked where they enter."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megapsft.config import ColumnsConfig
from megapsft.data.progress import watched
from megapsft.errors import Refused

ROLES = ("system", "user", "assistant", "tool")
MEDIA = ("image", "image_url", "input_image", "video", "video_url", "audio", "audio_url", "input_audio")  # parts of messages
DEFAULTS = ColumnsConfig()

Prompt = str | list[dict[str, Any]]  # a user turn, or chat messages [{"role": ..., "content": ...}]
Record = tuple[str, dict[str, Any]]  # "file:line", and the row as it stands in the file


@dataclass(frozen=True)
class Row:
    """One demonstration as it stands in the file."""

    prompt: Prompt
    demonstration: str
    source: str  # "file:line"; lines and Parquet rows count from 1


def read_rows(path: str | Path, columns: ColumnsConfig, limit: int | None = None) -> list[Row]:
    """All demonstrations of `path` (.jsonl or .parquet), or the first `limit`; what lies behind the limit is not looked at.

    Raises:
        Refused: as `read_records`; wrong type, blank prompt or demonstration, malformed chat messages. Names the file and the
            line.
    """
    records = read_records(path, columns, ("prompt", "demonstration"), limit=limit)
    return [parse_row(record, columns, source) for source, record in records]


def read_records(
    path: str | Path,
    columns: ColumnsConfig,
    required: Iterable[str],
    optional: Iterable[str] = (),
    limit: int | None = None,
) -> list[Record]:
    """All rows of `path` (.jsonl or .parquet), or the first `limit`; what lies behind the limit is not looked at.

    Args:
        required: keys of `columns` whose column every row has.
        optional: keys of `columns` whose column a row may have; one under another name than the default must be in some row.

    Raises:
        Refused: no such file, another suffix, malformed or empty file, missing column. Names the file and the line.
    """
    reader, path = _reader(path)
    needed, possible = named(columns, required), named(columns, optional)
    return _some(reader(path, needed, possible), limit, path, possible)


def read_whole_records(
    path: str | Path,
    columns: ColumnsConfig,
    required: Iterable[str],
    optional: Iterable[str] = (),
    limit: int | None = None,
) -> list[Record]:
    """As `read_records`, with all columns that a row has."""
    reader, path = _reader(path)
    needed, possible = named(columns, required), named(columns, optional)
    records = _some(reader(path, None, {}), limit, path, possible)
    for source, record in records:
        check_columns(record, needed, source)
    return records


def _some(reader: Iterable[Record], limit: int | None, path: Path, possible: Mapping[str, str]) -> list[Record]:
    """The records: there are some, and the optional columns that were asked for by another name."""
    with watched(itertools.islice(reader, limit), f"{path}: read", limit) as coming:
        records = list(coming)
    if not records:
        raise Refused(f"data.path={str(path)!r}", "holds no rows", "name a file with at least one")
    for key, name in possible.items():
        if name != getattr(DEFAULTS, key) and not any(name in record for _, record in records):
            present = dict.fromkeys(column for _, record in records for column in record)
            rule = f"is a column of no row; there are: {', '.join(map(str, present))}"
            raise Refused(f"data.columns.{key}={name}", rule, "name one of them, or leave it out")
    return records


def named(columns: ColumnsConfig, keys: Iterable[str]) -> dict[str, str]:
    """Key of `data.columns` -> name of the column."""
    return {key: getattr(columns, key) for key in keys}


def read_texts(path: str | Path) -> Iterator[str]:
    """Every string of every row, whatever its column, those inside of chat messages too: what a tokenizer is trained on.

    Raises:
        Refused: as `read_rows`, but for what it says of columns.
    """
    reader, path = _reader(path)
    for _, record in reader(path, None, {}):
        yield from _strings(record)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _reader(path: str | Path) -> tuple[Callable[..., Iterator[Record]], Path]:
    path = Path(path)
    if not path.is_file():
        raise Refused(f"data.path={str(path)!r}", "is not a file", "set data.path to a .jsonl or .parquet file")
    if path.suffix not in READERS:
        raise Refused(f"data.path={str(path)!r}", "must end in .jsonl or .parquet", "convert the file, or name another")
    return READERS[path.suffix], path


def read_jsonl(path: Path, required: Mapping[str, str] | None, optional: Mapping[str, str]) -> Iterator[Record]:
    """(source, record) of each line, with all its columns; blank lines are allowed at the end only."""
    blank = None
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            source = f"{path}:{number}"
            if not line.strip():
                blank = blank or source
                continue
            if blank:
                raise Refused(blank, "is a blank line between rows", "delete the line")
            try:
                record = json.loads(line.decode("utf-8"))
            except ValueError as error:  # of JSON and of UTF-8
                raise Refused(source, f"is not a line of JSON ({error})", "write one JSON object a line, in UTF-8") from None
            if not isinstance(record, dict):
                raise Refused(source, f"is a JSON {type(record).__name__}, not an object", "write one JSON object a line")
            if required is not None:
                check_columns(record, required, source)
            yield source, record


def read_parquet(path: Path, required: Mapping[str, str] | None, optional: Mapping[str, str]) -> Iterator[Record]:
    """(source, record) of each row; only the named columns are read (all, where None is required), a batch of rows at a time."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            wanted = None
            if required is not None:
                present = file.schema_arrow.names
                check_columns(present, required, f"{path}:1")
                wanted = [*required.values(), *(name for name in optional.values() if name in present)]
            batches = file.iter_batches(batch_size=1024, columns=wanted)
            records = (record for batch in batches for record in batch.to_pylist())
            for number, record in enumerate(records, start=1):
                yield f"{path}:{number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise Refused(str(path), f"is not a readable Parquet file ({' '.join(str(error).split())})", "write it anew") from None


READERS = {".jsonl": read_jsonl, ".parquet": read_parquet}


def check_columns(present: Iterable[str], required: Mapping[str, str], source: str) -> None:
    """Refuses where a column of `required` (key of data.columns -> name) is not `present`."""
    present = list(present)
    for key, name in required.items():
        if name in present:
            continue
        rule = f"is missing; the row has: {', '.join(map(str, present)) or 'no columns'}"
        if name == "demonstration" and "demostration" in present:  # a known misspelling in published data
            rule, present_name = f"is misspelt 'demostration' here ({rule})", "demostration"
        else:
            present_name = "NAME"
        raise Refused(f"{source}: column {name!r}", rule, f"data.columns.{key}={present_name} names another column")


def parse_row(record: dict[str, Any], columns: ColumnsConfig, source: str) -> Row:
    """The demonstration in a record that has both columns."""
    prompt = parse_prompt(record[columns.prompt], f"{source}: column {columns.prompt!r}")
    demonstration = parse_text(record[columns.demonstration], f"{source}: column {columns.demonstration!r}")
    return Row(prompt, demonstration, source)


def parse_prompt(prompt: Any, at: str) -> Prompt:
    """The prompt, with messages as `parse_message` gives them; it does not end with an assistant turn, nor blank."""
    if isinstance(prompt, list):
        prompt = parse_messages(prompt, at)
        if prompt[-1]["role"] == "assistant":
            raise Refused(at, "ends with an assistant turn", "move that turn to the demonstration; end with a user turn")
        check_text(prompt[-1]["content"], f"{at}, message {len(prompt)}")
    elif isinstance(prompt, str):
        check_text(prompt, at)
    else:
        raise Refused(at, f"is a {type(prompt).__name__}", "write a string or a list of chat messages")
    return prompt


def parse_text(text: Any, at: str) -> str:
    """The text, which is a string and not blank."""
    if not isinstance(text, str):
        raise Refused(at, f"is a {type(text).__name__}", "write a string")
    check_text(text, at)
    return text


def parse_messages(messages: list[Any], at: str) -> list[dict[str, Any]]:
    """The messages, at least one."""
    if not messages:
        raise Refused(at, "is an empty list of messages", "end it with a user turn")
    return [parse_message(message, f"{at}, message {number}") for number, message in enumerate(messages, start=1)]


def parse_message(message: Any, at: str) -> dict[str, Any]:
    """The message without its null fields, which Parquet adds to every struct and templates may take for present."""
    if not isinstance(message, dict):
        raise Refused(at, f"is a {type(message).__name__}", 'write {"role": ..., "content": ...}')
    if message.get("role") not in ROLES:
        raise Refused(at, f"has role {message.get('role')!r}", f"use one of {', '.join(ROLES)}")
    media = next(_media(message.get("content")), None)
    if media is not None:
        raise Refused(at, f"holds a part of type {media!r}, and text alone is trained", "leave the row out")
    if not isinstance(message.get("content"), str):
        raise Refused(at, f"has content of type {type(message.get('content')).__name__}", "write a string")
    check_unicode(message["content"], at)
    return {key: value for key, value in message.items() if value is not None}


def _media(content: Any) -> Iterator[str]:
    """Types of the parts of a message that are no text; Parquet has null for the keys that a part lacks."""
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict):
            yield from (key for key in MEDIA if part.get("type") == key or part.get(key) is not None)


def parse_logprobs(values: Any, at: str) -> np.ndarray:
    """[n] fp32 of a list of log-probabilities: finite, and above 0 only by rounding."""
    if not isinstance(values, list) or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        raise Refused(at, "is not a list of numbers", "write one log-probability for each response token, terminator included")
    for number, value in enumerate(values, start=1):
        if not -1e38 < value <= 1e-3:  # fp32 holds it, and nan is refused too
            raise Refused(f"{at}, entry {number}", f"is {value}", "a log-probability is finite and at most 0")
    return np.array(values, dtype=np.float32)


def check_text(text: str, at: str) -> None:
    if not text.strip():
        raise Refused(at, "is empty or blank", "fill it, or delete the row")
    check_unicode(text, at)


def check_unicode(text: str, at: str) -> None:
    """JSON can spell half a surrogate pair; no tokenizer can read it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        rule = f"holds half a surrogate pair at character {error.start}"
        raise Refused(at, rule, "repair the text, or delete the row") from None
