"""Files that appear whole: whatever happens meanwhile, there is the old one or the new one, never half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write what `path` is to be when the block ends; where the block raises, `path` stays as it was. Folders are made.

    What is no file, such as a pipe or /dev/stdout, cannot be replaced, and is written to as it is. Of a link, what it names is
    replaced, and the link stays.
    """
    if is_special(path):
        yield path
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())  # before it has the name: else a crash of the machine may leave an empty file
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """The text, in UTF-8, as the whole of the file."""
    with whole(path) as place:
        place.write_text(text, encoding="utf-8")


def is_special(path: Path) -> bool:
    """Whether it is there, and neither a file nor a folder: a device, a pipe."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


__all__ = ["is_special", "whole", "write_whole"]
