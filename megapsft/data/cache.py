"""Rows that are tokenised once: by whichever process comes first, for all ranks, for runs that go on and for the next ones."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megapsft.config import DataConfig
from megapsft.data import mapped
from megapsft.data.dataset import Dataset
from megapsft.errors import Refused
from megapsft.output.places import check_folder

NOT_OF_TOKENS = ("packing", "pack_length", "micro_batch_size", "shuffle", "cache")  # options of data that come after the tokens
OF_TOKENIZER = (".json", ".jinja", ".txt", ".model", ".tiktoken")  # files of a model folder that are no weights
NOT_OF_TOKENIZER = ("conversion.json",)  # of our exports: where they are from, which differs where the tokenizer is the same
LIBRARIES = ("jinja2", "numpy", "tokenizers", "transformers")
MANY_ROWS = 50_000  # which may take minutes, and gigabytes of each process
EDGE = 1 << 20  # bytes of both ends of the data that tell it from another of its size and time


def cached(load: Callable[[], Dataset], config: DataConfig, model: Path, vocab_size: int) -> Dataset:
    """What `load` gives, from a folder in `config.cache`; where it is not there yet, this process makes it, and others wait.

    The folder is named after all that decides the tokens (`_identity`), so it never has to be made invalid: what is not asked for
    any more may be deleted.

    Args:
        model: whose tokenizer and chat template `load` uses.

    Raises:
        Refused: what `load` refuses; kind=prompts; a place that cannot be written to, has no room or knows no locks; a folder in
            it that is not whole.
    """
    value = f"data.cache={config.cache}"
    if config.kind == "prompts":
        rule = "holds rows that are trained as they are, and those of data.kind=prompts are sampled from"
        raise Refused(value, rule, "leave it out: prompts are short")
    if not config.cache:
        raise Refused(value, "names no folder", "name one such as cache, or leave it out")
    place = Path(config.cache)
    name = hashlib.blake2b(json.dumps(_identity(config, model, vocab_size), sort_keys=True).encode(), digest_size=16).hexdigest()
    folder = place / f"{Path(config.path).stem[:30]}-{name}"
    if not folder.is_dir():
        check_folder(value, place)
        with _alone(place / f".{folder.name}.lock", value, config.path):
            if not folder.is_dir():
                _fill(folder, load(), value)
    return mapped.read(folder)


def _identity(config: DataConfig, model: Path, vocab_size: int) -> dict[str, Any]:
    """All that decides which tokens there are, as JSON values."""
    data = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_OF_TOKENS}
    tokenizer = sorted(
        path
        for path in model.iterdir()
        if path.suffix in OF_TOKENIZER and path.name not in NOT_OF_TOKENIZER and not path.name.endswith(".index.json")
    )
    return {
        "data": data,
        "file": _file(Path(config.path)),
        "tokenizer": {path.name: _digest(path.read_bytes()) for path in tokenizer},
        "vocab_size": vocab_size,
        "libraries": {name: version(name) for name in LIBRARIES},
        "code": {path.name: _digest(path.read_bytes()) for path in sorted(Path(__file__).parent.glob("*.py"))},
    }


def _file(path: Path) -> dict[str, Any] | None:
    """Size, time and both ends; None where it is not there, which the loaders refuse in their words."""
    if not path.is_file():
        return None
    found = path.stat()
    with path.open("rb") as file:
        ends = file.read(EDGE)
        file.seek(max(0, found.st_size - EDGE))
        ends += file.read()
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns, "ends": _digest(ends)}


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def note_on_cache(config: DataConfig, rows: int, processes: int) -> str | None:
    """What the user of a large file should know."""
    if config.cache is not None or config.kind == "prompts" or rows < MANY_ROWS or processes == 1:
        return None
    return f"{rows:,} rows are tokenised and held by each of {processes} processes; data.cache=FOLDER does it once."


@contextmanager
def _alone(lock: Path, value: str, data: str) -> Iterator[None]:
    """One process of those that come here at a time; the first rank says that it waits."""
    with _writes(value):
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a")
    with file:
        with _writes(value):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if os.environ.get("RANK", "0") == "0":
                    print(f"{data}: another process tokenises it for {value}; waiting", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fill(folder: Path, dataset: Dataset, value: str) -> None:
    """The folder appears whole, or not at all."""
    beside = folder.with_name(f".{folder.name}.{socket.gethostname()}")  # on some file systems a lock is of one node alone
    with _writes(value):
        shutil.rmtree(beside, ignore_errors=True)  # of one that was killed
        try:
            beside.mkdir()
            mapped.write(dataset, beside)
            try:
                beside.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another node has made the same meanwhile
                    raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def _writes(value: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = "make room, name another folder, or leave it out"
        raise Refused(value, f"cannot be written to ({error})", remedy) from None


__all__ = ["cached", "note_on_cache"]
