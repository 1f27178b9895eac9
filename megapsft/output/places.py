"""Places that are written to at the end of something long: looked at before it begins, so that nothing is lost."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from megapsft.errors import Refused
from megapsft.output.whole import is_special


def check_file(option: str, path: Path | None) -> None:
    """That a file can be written there, new or in the place of an old one, as `whole` does; nothing where there is no path.

    Args:
        option: what the user calls it, such as `--out`.

    Raises:
        Refused: it is a folder, lies under a file, or where this user may not write.
    """
    if path is None:
        return
    if is_special(path):
        if not os.access(path, os.W_OK):
            raise Refused(f"{option} {path}", "is not yours to write to", "name a place where you may write")
        return
    if os.path.isdir(path):  # pathlib's own raises where a folder on the way is closed to this user
        raise Refused(f"{option} {path}", "is a folder", "name a file in it")
    real = Path(os.path.realpath(path))
    _check(f"{option} {path}", real, [*real.parents])


def check_folder(value: str, folder: Path) -> None:
    """That files can be written in a folder, which may have to be made first.

    Args:
        value: what the user calls it, as it is to stand in the message.

    Raises:
        Refused: it is a file or lies under one, or this user may not write there.
    """
    folder = folder.absolute()
    _check(value, folder, [folder, *folder.parents])


def _check(value: str, path: Path, folders: Sequence[Path]) -> None:
    """The innermost of `folders` that is there is a folder, and may be written to."""
    there = next(folder for folder in folders if os.path.exists(folder))
    if not os.path.isdir(there):
        raise Refused(value, "is a file" if there == path else f"lies under {there}, a file", "name another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise Refused(value, f"cannot be written: {there} is not yours to write to", "name a place where you may write")
