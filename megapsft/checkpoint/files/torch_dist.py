"""The torch_dist format: chunks of tensors, each a record (`records.py`), and `.metadata` that says where each lies."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megapsft.checkpoint.files.pickles import REMEDY, Unpickler, check_values, damaged, write_pickle
from megapsft.checkpoint.files.records import Chunk, without_checksums
from megapsft.checkpoint.weights import Shape
from megapsft.errors import Refused

METADATA, COMMON, FORMAT = ".metadata", "common.pt", "metadata.json"
STORED_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1,
                 "common_backend": "torch", "common_backend_version": 1}  # fmt: skip


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
        raise damaged(folder / METADATA, error) from None


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
            found = Unpickler(file, str(folder / METADATA)).load()
        if not isinstance(found, Metadata):
            raise ValueError(f"holds a {type(found).__name__}")
    except Refused:
        raise
    except Exception as error:  # an unpickler fails in any way on damaged bytes
        raise damaged(folder / METADATA, error) from None
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
        check_values(content, what, states="._extra_state" in what)


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
    write_pickle(folder / METADATA, Metadata(state_dict_metadata=found, storage_data=storage))
    with without_checksums():
        torch.save({"iteration": 0, "checkpoint_version": 3.0}, folder / COMMON)
    (folder / FORMAT).write_text(json.dumps(STORED_FORMAT))


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
