"""A folder that appears complete, or not at all: written beside its place as `.NAME.partial`, and renamed at the end."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from megapsft.checkpoint.files.direct import sync
from megapsft.errors import Refused

LOCK = "lock"


def check_free(out: Path) -> None:
    """That `out` can become a new folder.

    Raises:
        Refused: it is a file, or a folder that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Refused(str(out), "exists and is not an empty folder", "name another folder, or delete this one")


class Unfinished:
    """The partial folder of `out`, held by this process alone until it is finished or left.

    Args:
        out: a new folder, an empty one, or a link to where one is to be.

    Raises:
        Refused: `out` is taken, its place cannot be written to, or another process is at work on it.
    """

    def __init__(self, out: Path):
        check_free(out)
        self.out = out.resolve()
        if os.path.ismount(self.out):
            remedy = f"name a folder in it, such as {out / 'checkpoint'}"
            raise Refused(str(out), "is a mount point, which a finished folder cannot replace", remedy)
        self.folder = self.out.parent / f".{self.out.name}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / LOCK).open("a")
        except NotADirectoryError:
            raise Refused(str(out), "lies under a file, not a folder", "name another place") from None
        except OSError as error:
            rule = f"cannot be written to ({error.strerror})"
            raise Refused(str(self.out.parent), rule, "name a place where you may write") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            rule = "is being written by another process"
            raise Refused(str(self.folder), rule, "wait for it to end, or name another folder") from None
        try:
            check_free(self.out)  # again: the other process may have ended since
        except Refused:
            self.discard()
            raise

    def empty(self) -> None:
        """Delete what an earlier attempt left."""
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()

    def finish(self) -> None:
        """Make all of it safe on the disk, and give it its name.

        Raises:
            Refused: the name was taken meanwhile.
        """
        for path in [*self.folder.rglob("*"), self.folder]:
            sync(path)
        try:
            os.rename(self.folder, self.out)  # onto an empty folder, too
        except OSError as error:
            rule = f"cannot be made any more ({error.strerror})"
            raise Refused(str(self.out), rule, f"make room for it, and rename {self.folder}, which is complete") from None
        (self.out / LOCK).unlink()  # not before: another process would begin anew in what is being finished
        self._lock.close()
        sync(self.out)
        sync(self.out.parent)

    def leave(self) -> None:
        """Let another attempt go on from what is there."""
        self._lock.close()

    def discard(self) -> None:
        """Delete all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()
