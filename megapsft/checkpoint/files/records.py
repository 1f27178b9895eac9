"""Records: a tensor of a torch_dist checkpoint as torch.save writes it. Where its data lies, and what stands around it."""

from __future__ import annotations

import contextlib
import io
import math
import struct
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from megapsft.checkpoint.files.direct import Source
from megapsft.checkpoint.files.pickles import Unpickler
from megapsft.checkpoint.weights import Shape
from megapsft.errors import Refused

HEADER_BYTES = 4096  # more than a record has before its data
STORAGES = {name: dtype for dtype, name in torch.storage._dtype_to_storage_type_map().items()}


class Chunk(NamedTuple):
    """A rectangle of a tensor, and where its record lies."""

    offsets: Shape
    sizes: Shape
    file: str
    offset: int
    length: int


class Envelope(NamedTuple):
    """What torch.save writes around the data of a contiguous tensor."""

    head: bytes
    nbytes: int
    tail: bytes

    @property
    def length(self) -> int:
        return len(self.head) + self.nbytes + len(self.tail)


@lru_cache(maxsize=4096)
def envelope(dtype: torch.dtype, sizes: Shape) -> Envelope:
    """The record of a tensor without its data. Checksums in it are zero: torch does not check them, and `verify` has its own."""
    with without_checksums():
        tensor = torch.empty(sizes, dtype=dtype)  # its pages are never touched, and only ever read
        sink = _Sink(skip=max(HEADER_BYTES, tensor.nbytes) if tensor.nbytes >= HEADER_BYTES else None)
        if sink.skip is None:
            tensor.zero_()
        torch.save(tensor, sink)
    if sink.skip is not None:
        head, tail = b"".join(sink.before), b"".join(sink.after)
        return Envelope(head, tensor.nbytes, tail)
    content = b"".join(sink.before)
    offset, _ = _entry(io.BytesIO(content), "/data/0")
    return Envelope(content[:offset], tensor.nbytes, content[offset + tensor.nbytes :])


class Records:
    """Finds the data in records of any torch version; asks the file no more than it must."""

    def __init__(self) -> None:
        self._known: dict[tuple, tuple[int, bytes]] = {}
        self._lock = threading.Lock()

    def data_offset(self, source: Source, chunk: Chunk, dtype: torch.dtype) -> int:
        """Where in the file the data of a chunk begins: row by row, without gaps.

        Raises:
            Refused: the record is damaged, or is not a contiguous tensor of this dtype and these sizes.
        """
        kind = (chunk.length, dtype, chunk.sizes)
        known = self._known.get(kind)
        if known is not None:
            head = torch.empty(known[0], dtype=torch.uint8)
            source.read(chunk.offset, head)
            if _pickled(head.numpy().tobytes()) == known[1]:
                return chunk.offset + known[0]
        view = _View(source, chunk.offset, chunk.length)
        try:
            offset, size = _entry(view, "/data/0")
            at, length = _entry(view, "/data.pkl")
            view.seek(at)
            content = view.read(length)
            if size != math.prod(chunk.sizes) * dtype.itemsize:
                raise ValueError(f"{size} bytes of data")
            what = _Described(io.BytesIO(content), str(source.path)).load()
        except Refused:
            raise
        except Exception as error:  # zipfile and pickle fail in any way on damaged bytes: it is said below, with what it was
            reason = f"holds a damaged record at byte {chunk.offset} ({type(error).__name__}: {error})"
            raise Refused(str(source.path), reason, "copy the checkpoint again, or use another one") from None
        if what != _contiguous(dtype, chunk.sizes):
            rule = f"holds {what} at byte {chunk.offset}, where .metadata says {_contiguous(dtype, chunk.sizes)}"
            raise Refused(str(source.path), rule, "save the checkpoint again with contiguous parameters")
        with self._lock:
            self._known[kind] = (offset, content)
        return chunk.offset + offset


def nothing_record() -> bytes:
    """The record of an `_extra_state` that holds nothing, as Megatron saves it."""
    content = io.BytesIO()
    with without_checksums():
        torch.save([None], content)
    return content.getvalue()


class _Described(Unpickler):
    """Of a record's pickle: the dtype, storage offset, sizes and strides of its tensor, and nothing made."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _describe
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return name  # a dtype in old words
        return super().find_class(module, name)

    def persistent_load(self, saved: Any) -> Any:
        return STORAGES.get(saved[1], saved[1])


def _describe(dtype: torch.dtype, offset: int, sizes: Shape, strides: Shape, *rest: Any) -> tuple:
    """Strides of dimensions of one element say nothing."""
    kept = tuple(stride for stride, size in zip(strides, sizes, strict=True) if size != 1)
    return dtype, offset, tuple(sizes), kept


def _contiguous(dtype: torch.dtype, sizes: Shape) -> tuple:
    return _describe(dtype, 0, sizes, torch.empty(sizes, device="meta").stride())


def _pickled(head: bytes) -> bytes:
    """data.pkl, the first entry of a record."""
    start = head.find(b"/data.pkl")
    if start < 0 or head[:4] != b"PK\x03\x04":
        return b""
    size = struct.unpack_from("<I", head, 18)[0]
    begin = 30 + sum(struct.unpack_from("<HH", head, 26))
    return head[begin : begin + size]


def _entry(file: Any, suffix: str) -> tuple[int, int]:
    """Where in a record the bytes of an entry begin, and how many they are. Checksums are not looked at: they may be zero."""
    with zipfile.ZipFile(file) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith(suffix))
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError("its data is compressed")
    file.seek(entry.header_offset)
    header = file.read(30)
    return entry.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26)), entry.file_size


class _Sink:
    """A file for torch.save that keeps all but the data of one large storage."""

    def __init__(self, skip: int | None):
        self.skip = skip
        self.before: list[bytes] = []
        self.after: list[bytes] = []
        self._skipped = 0

    def write(self, content: Any) -> int:
        size = len(content)
        if self.skip is not None and (size == self.skip or 0 < self._skipped < self.skip):
            self._skipped += size
        else:
            (self.after if self._skipped else self.before).append(bytes(content))
        return size

    def flush(self) -> None:
        pass


class _View(io.RawIOBase):
    """One record of a file, as a file."""

    def __init__(self, source: Source, offset: int, length: int):
        self._source, self._offset, self._length, self._at = source, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        size = left if size is None or size < 0 else min(size, left)
        content = torch.empty(size, dtype=torch.uint8)
        self._source.read(self._offset + self._at, content)
        self._at += size
        return content.numpy().tobytes()


@contextlib.contextmanager
def without_checksums() -> Iterator[None]:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


__all__ = ["Chunk", "Envelope", "Records", "envelope", "nothing_record", "without_checksums"]
