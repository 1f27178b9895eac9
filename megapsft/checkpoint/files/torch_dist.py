"""The torch_dist format: chunks of tensors, each a record as torch.save writes it, and `.metadata` that says where each lies.

`.metadata` and the records are pickles. They are read with a list of the few classes that belong there: another one is refused
before it is called.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import pickle
import struct
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megapsft.checkpoint.files.direct import Source
from megapsft.checkpoint.weights import Shape
from megapsft.errors import Refused

METADATA, COMMON, FORMAT = ".metadata", "common.pt", "metadata.json"
STORED_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1,
                 "common_backend": "torch", "common_backend_version": 1}  # fmt: skip
HEADER_BYTES = 4096  # more than a record has before its data
TAIL_BYTES = 65536  # more than a record has after it
REMEDY = "read it with the program that wrote it, and only if you trust where it comes from"
STORAGES = {name: dtype for dtype, name in torch.storage._dtype_to_storage_type_map().items()}
ALLOWED = {  # module -> names that may be called while unpickling
    "torch.distributed.checkpoint.metadata": {name for name in vars(metadata) if isinstance(vars(metadata)[name], type)},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath"},  # where torch's own writer wrote to
}
OF_STORAGE = (  # numbers of a tensor in a pickle; Megatron-Core puts its own in the place of torch's from 0.18 on
    ("torch.storage", "_load_from_bytes"),
    ("megatron.core.safe_globals", "safe_load_from_bytes"),
)
ALLOWED_IN_STATES = {  # in what Transformer Engine pickles of its own: the recipe of FP8, of 2.18 and newer the delayed one alone
    "transformer_engine.common.recipe": {
        "DelayedScaling", "Float8BlockScaling", "Float8CurrentScaling", "Format", "MMParams", "MXFP8BlockScaling", "QParams",
        "_FormatHelper", "_OverrideLinearPrecision",
    },
    "megatron.core.extensions.transformer_engine": {"TEDelayedScaling"},
    "torch._utils": {"_rebuild_tensor_v2"},
    "collections": {"OrderedDict"},
}  # fmt: skip


class Chunk(NamedTuple):
    """A rectangle of a tensor, and where its record lies."""

    offsets: Shape
    sizes: Shape
    file: str
    offset: int
    length: int


class Index(NamedTuple):
    """What a checkpoint holds."""

    shapes: dict[str, Shape]
    dtypes: dict[str, torch.dtype]
    chunks: dict[str, list[Chunk]]
    objects: dict[str, Chunk]  # what is not a tensor; `offsets` and `sizes` are empty


def read_index(folder: Path) -> Index:
    """Which tensors and objects a checkpoint holds, and where.

    Raises:
        Refused: no such checkpoint, a damaged one, one in another format, or one whose `.metadata` names a class that does not
            belong there.
    """
    _check_format(folder)
    found = read_metadata(folder)
    try:
        return _index(folder, found)
    except Refused:
        raise
    except Exception as error:  # any attribute of what was unpickled may be anything
        raise _damaged(folder / METADATA, error) from None


def _index(folder: Path, found: Metadata) -> Index:
    index = Index({}, {}, {}, {})
    for key, entry in found.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            index.shapes[key], index.dtypes[key] = tuple(entry.size), entry.properties.dtype
            index.chunks[key] = []
    for place, info in (found.storage_data or {}).items():
        if getattr(info, "transform_descriptors", None):
            rule = f"is stored with {info.transform_descriptors}, which is not read here"
            raise Refused(f"{folder}: {place.fqn}", rule, "save the checkpoint without extensions")
        path = Path(info.relative_path)
        if path.is_absolute() or ".." in path.parts:
            raise Refused(f"{folder / METADATA}", f"names {path}, which is not in the folder", REMEDY)
        if info.offset < 0 or info.length < 0:
            raise ValueError(f"{info.length} bytes at {info.offset}")
        record = (info.relative_path, info.offset, info.length)
        if place.fqn in index.chunks:
            entry = found.state_dict_metadata[place.fqn]
            offsets = tuple(place.offset) if place.offset is not None else (0,) * len(entry.size)
            index.chunks[place.fqn].append(Chunk(offsets, (), *record))
        else:
            index.objects[place.fqn] = Chunk((), (), *record)
    for key, chunks in index.chunks.items():
        sizes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in found.state_dict_metadata[key].chunks}
        lost = [chunk.offsets for chunk in chunks if chunk.offsets not in sizes]
        if lost or len(sizes) != len(chunks):
            raise Refused(f"{folder}: {key}", "has chunks that its .metadata does not place", "copy the checkpoint again")
        index.chunks[key] = [chunk._replace(sizes=sizes[chunk.offsets]) for chunk in chunks]
        for offsets, lengths in sizes.items():
            if any(
                low < 0 or size < 0 or low + size > most
                for low, size, most in zip(offsets, lengths, index.shapes[key], strict=True)
            ):
                raise ValueError(f"{key} has a chunk {list(lengths)} at {list(offsets)}")
    return index


def read_metadata(folder: Path) -> Metadata:
    """`.metadata`, unpickled with nothing but the classes that belong there.

    Raises:
        Refused: it is damaged, or names another class.
    """
    try:
        with (folder / METADATA).open("rb") as file:
            found = _Unpickler(file, str(folder / METADATA)).load()
        if not isinstance(found, Metadata):
            raise ValueError(f"holds a {type(found).__name__}")
    except Refused:
        raise
    except Exception as error:  # an unpickler fails in any way on damaged bytes
        raise _damaged(folder / METADATA, error) from None
    return found


def check_harmless(folder: Path, index: Index) -> None:
    """That nothing in the checkpoint runs code when Megatron unpickles it: its common state and all that is not a tensor.

    The common state is a file until Megatron-Core 0.18, an object among the others from 0.19 on.

    Raises:
        Refused: something is not made of plain values and tensors.
    """
    objects = {(chunk.file, chunk.offset, chunk.length): key for key, chunk in index.objects.items()}
    records: Iterator[tuple[str, bytes]] = (
        (f"{folder / file}: {key}", _part_of(folder / file, offset, length)) for (file, offset, length), key in objects.items()
    )
    common = [(str(folder / COMMON), (folder / COMMON).read_bytes())] if (folder / COMMON).exists() else []
    for what, content in [*common, *records]:
        try:
            with torch.serialization.safe_globals([io.BytesIO]):  # what Transformer Engine's states are in
                found = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
            if "._extra_state" in what:
                _check_state(found)
        except pickle.UnpicklingError as error:
            reason = " ".join(str(error).split())[:200]
            raise Refused(what, f"is not made of plain values and tensors ({reason})", REMEDY) from None
        except Exception as error:  # an unpickler fails in any way on damaged bytes
            raise _damaged(what, error) from None


def _check_state(state: Any) -> None:
    """Unpickle what a layer of Transformer Engine pickled into bytes, without importing or calling anything that it names."""
    if isinstance(state, io.BytesIO):
        _States(state).load()
    elif isinstance(state, torch.Tensor) and state.numel():
        _States(io.BytesIO(state.numpy().tobytes())).load()


class _States(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in OF_STORAGE:
            return lambda content: torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        if name in ALLOWED_IN_STATES.get(module, ()):
            return _Inert
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class _Inert:
    """Stands for anything that is allowed; does nothing."""

    def __init__(self, *args: Any, **kwargs: Any): ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...


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
    with _without_checksums():
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
        except Exception as error:
            reason = f"holds a damaged record at byte {chunk.offset} ({type(error).__name__}: {error})"
            raise Refused(str(source.path), reason, "copy the checkpoint again, or use another one") from None
        if what != _contiguous(dtype, chunk.sizes):
            rule = f"holds {what} at byte {chunk.offset}, where .metadata says {_contiguous(dtype, chunk.sizes)}"
            raise Refused(str(source.path), rule, "save the checkpoint again with contiguous parameters")
        with self._lock:
            self._known[kind] = (offset, content)
        return chunk.offset + offset


def write_metadata(
    folder: Path,
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, torch.dtype],
    chunks: Mapping[str, Sequence[Chunk]],
    objects: Mapping[str, Chunk],
) -> None:
    """`.metadata`, `common.pt` and `metadata.json` of a checkpoint whose records are written already."""
    found: dict[str, Any] = {}
    storage = {}
    for key, places in chunks.items():
        rectangles = [ChunkStorageMetadata(torch.Size(place.offsets), torch.Size(place.sizes)) for place in places]
        found[key] = TensorStorageMetadata(TensorProperties(dtype=dtypes[key]), torch.Size(shapes[key]), rectangles)
        for number, place in enumerate(places):
            storage[MetadataIndex(key, torch.Size(place.offsets), number)] = _info(place)
    for key, place in objects.items():
        found[key] = BytesStorageMetadata()
        storage[MetadataIndex(key)] = _info(place)
    with (folder / METADATA).open("wb") as file:
        pickle.dump(Metadata(state_dict_metadata=found, storage_data=storage), file)
    with _without_checksums():
        torch.save({"iteration": 0, "checkpoint_version": 3.0}, folder / COMMON)
    (folder / FORMAT).write_text(json.dumps(STORED_FORMAT))


def nothing_record() -> bytes:
    """The record of an `_extra_state` that holds nothing, as Megatron saves it."""
    content = io.BytesIO()
    with _without_checksums():
        torch.save([None], content)
    return content.getvalue()


def _damaged(what: object, error: Exception) -> Refused:
    reason = f"is damaged ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return Refused(str(what), reason, "copy the checkpoint again, or use another one")


def _info(place: Chunk) -> Any:
    return filesystem._StorageInfo(place.file, place.offset, place.length)


def _part_of(path: Path, offset: int, length: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(length)
    except OSError as error:
        raise Refused(str(path), f"cannot be read ({error})", "copy the checkpoint again") from None


def _check_format(folder: Path) -> None:
    file = folder / FORMAT
    if not file.is_file() or not (folder / METADATA).is_file():
        lacking = FORMAT if not file.is_file() else METADATA
        rule = f"is not a whole torch_dist checkpoint (no {lacking})"
        raise Refused(str(folder), rule, "name a folder such as RUN/checkpoints/latest, or one that the import made")
    try:
        backend = json.loads(file.read_text()).get("sharded_backend")
    except (ValueError, AttributeError) as error:
        raise Refused(str(file), f"is damaged ({error})", "copy the checkpoint again, or use another one") from None
    if backend != "torch_dist":
        rule = f"names the format {backend!r}; only torch_dist is read"
        raise Refused(str(file), rule, "save the checkpoint again with --ckpt-format torch_dist")


class _Unpickler(pickle.Unpickler):
    allowed: Mapping[str, set[str]] = ALLOWED

    def __init__(self, file: Any, what: str):
        super().__init__(file)
        self._what = what

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.allowed.get(module, ()):
            raise Refused(self._what, f"would call {module}.{name} when it is read, which no checkpoint needs", REMEDY)
        return super().find_class(module, name)


class _Described(_Unpickler):
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
def _without_checksums() -> Iterator[None]:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
