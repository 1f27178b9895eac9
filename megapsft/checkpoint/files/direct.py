"""Reads and writes at a place in a file, past the page cache where the file system allows it, through it elsewhere.

Copying through the page cache costs more processor time than the disk takes, and pushes out what others have cached. Direct I/O
wants file offsets, lengths and memory in whole pages: reads take some bytes around what is asked for, and of a write what is
not whole pages goes through the cache.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
import weakref
from pathlib import Path

import torch
from torch import Tensor

from megapsft.errors import Refused

PAGE = 4096
DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it
REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)  # of direct I/O, by file systems without it
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def page_floor(offset: int) -> int:
    return offset // PAGE * PAGE


def page_ceil(offset: int) -> int:
    return -(-offset // PAGE) * PAGE


def new_buffer(nbytes: int) -> Tensor:
    """[nbytes] uint8 in whole pages of memory of its own; pages that are never touched take none."""
    return torch.frombuffer(mmap.mmap(-1, page_ceil(max(1, nbytes))), dtype=torch.uint8)[:nbytes]


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, as uint8, in the same memory."""
    return tensor.reshape(-1).view(torch.uint8)


class Buffers(threading.local):
    """A buffer for each thread, made when it is first asked for and grown where it must be."""

    def __init__(self) -> None:
        self._buffer = new_buffer(0)

    def take(self, nbytes: int) -> Tensor:
        """[nbytes] uint8 at the start of a page; the same memory each time."""
        if len(self._buffer) < nbytes:
            self._buffer = new_buffer(nbytes)
        return self._buffer[:nbytes]


class Source:
    """A file that is read by several threads. Args: buffers: where reads put the whole pages around what is asked for."""

    def __init__(self, path: Path, buffers: Buffers, direct: bool = True):
        self.path, self._buffers = path, buffers
        self._plain = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._plain).st_size
        self._direct = _open_direct(path, os.O_RDONLY) if direct else None
        self.close = weakref.finalize(self, _close, self._plain, self._direct)  # also when nobody has it any more
        if self._direct is not None:  # what is read through the cache all the same is small, and not followed by more
            os.posix_fadvise(self._plain, 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, offset: int, out: Tensor) -> None:
        """Fill `out`, contiguous uint8, with the bytes from `offset` on.

        Raises:
            Refused: the file ends before.
        """
        descriptor = self._direct  # another thread may find out that it does not work
        if descriptor is None or len(out) < PAGE:
            self._read_through(offset, out)
            return
        first = page_floor(offset)
        straight = offset == first and len(out) % PAGE == 0 and out.data_ptr() % PAGE == 0
        pages = out if straight else self._buffers.take(page_ceil(offset + len(out)) - first)
        try:
            self._fill(descriptor, first, pages, offset + len(out) - first)
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            self._direct = None
            self._read_through(offset, out)
            return
        if not straight:
            out.copy_(pages[offset - first : offset - first + len(out)])

    def _read_through(self, offset: int, out: Tensor) -> None:
        self._fill(self._plain, offset, out, len(out))

    def _fill(self, descriptor: int, offset: int, out: Tensor, needed: int) -> None:
        view, done = memoryview(out.numpy()), 0
        while done < needed:
            got = os.preadv(descriptor, [view[done:]], offset + done)
            done += got
            if done < needed and (got == 0 or offset + done >= os.fstat(descriptor).st_size):
                rule = f"ends after {offset + done} bytes; {offset + needed} were to be there"
                raise Refused(str(self.path), rule, "download or copy the file again")
            if done < needed and done % PAGE and descriptor != self._plain:
                raise OSError(errno.EINVAL, "a direct read ended within a page, where none can begin")


class Target:
    """A file of known size that is written by several threads, each its own places.

    Args:
        size: of the file. All of it is taken from the disk at once, so that a full disk is noticed before anything is written.

    Raises:
        Refused: the disk is full.
    """

    def __init__(self, path: Path, size: int, direct: bool = True):
        self.path = path
        with refuse_full(path):
            self._plain = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            if os.fstat(self._plain).st_size != size:
                _allocate(self._plain, size)
        self._direct = _open_direct(path, os.O_WRONLY) if direct else None
        self.close = weakref.finalize(self, _close, self._plain, self._direct)

    def write(self, offset: int, data: Tensor) -> None:
        """Put `data`, uint8 at the start of a page of memory, at `offset`.

        Raises:
            Refused: the disk is full.
        """
        descriptor = self._direct  # another thread may find out that it does not work
        whole = page_floor(len(data)) if descriptor is not None and offset % PAGE == 0 and data.data_ptr() % PAGE == 0 else 0
        with refuse_full(self.path):
            if whole:
                try:
                    self._put(descriptor, offset, data[:whole])
                except OSError as error:
                    if error.errno not in REFUSALS:
                        raise
                    self._direct, whole = None, 0
            self._put(self._plain, offset + whole, data[whole:])

    def _put(self, descriptor: int | None, offset: int, data: Tensor) -> None:
        view, done = memoryview(data.numpy()), 0
        while done < len(data):
            done += os.pwritev(descriptor, [view[done:]], offset + done)

    def sync(self) -> None:
        """Return when all that was written is on the disk."""
        with refuse_full(self.path):
            os.fdatasync(self._plain)


def has_size(path: Path, size: int) -> bool:
    """Whether there is a file of so many bytes."""
    return path.is_file() and path.stat().st_size == size


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def refuse_full(path: Path):
    """What the disk says when it is full, as a refusal."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        remedy = "free some space, or write to another disk; run the same command again to go on from here"
        raise Refused(str(path), f"cannot grow: {os.strerror(error.errno)}", remedy) from None


def _close(*descriptors: int | None) -> None:
    for descriptor in descriptors:
        if descriptor is not None:
            os.close(descriptor)


def _open_direct(path: Path, flags: int) -> int | None:
    if not DIRECT:
        return None
    try:
        return os.open(path, flags | DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        return None


def _allocate(descriptor: int, size: int) -> None:
    os.ftruncate(descriptor, 0)
    try:
        if size:
            os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in FULL:
            os.ftruncate(descriptor, 0)
        if error.errno not in REFUSALS:
            raise
        os.ftruncate(descriptor, size)
