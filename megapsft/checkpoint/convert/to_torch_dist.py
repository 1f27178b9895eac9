"""A torch_dist checkpoint that Megatron loads under any split: each chunk is some rows of one Hugging Face tensor.

Between the data of two chunks lie the end of the one's record and the head of the next, so placed that data begins at a whole
page of the file. The vocabulary is stored without padding: Megatron pads it for its own split when it loads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megapsft.checkpoint.files import direct
from megapsft.checkpoint.files.records import Chunk, Envelope, envelope, nothing_record
from megapsft.checkpoint.files.torch_dist import write_metadata
from megapsft.checkpoint.weights import Shape, Stored
from megapsft.models.adapters import adapter_places
from megapsft.models.families import family_of
from megapsft.models.hf_config import HFConfig
from megapsft.models.parameters import Rule
from megapsft.models.stored_names import extra_states, stored_at

CHUNK_BYTES = 32 * 2**20  # a reader takes a chunk as a whole
FILE_BYTES = 4 * 2**30
NOTHING = "__0_0.distcp"  # holds the one record of all empty extra states


class _Rows(NamedTuple):
    """Rows of a Hugging Face tensor, and where they go."""

    start: int
    stop: int
    file: str
    offset: int  # of the first one's first byte


class TorchDistTarget:
    """Implements Target.

    Args:
        folder: that the files go to; it is made when they are.
        tensors: of a whole model, and where there is one, of the adapter beside it.
        hf: config of the model.
        adapter: the rules of the adapter.
        direct: write past the page cache where the file system allows.
    """

    def __init__(
        self, folder: Path, tensors: Mapping[str, Stored], hf: HFConfig, direct: bool = True, adapter: Sequence[Rule] = ()
    ):
        self.folder, self.tensors, self._direct = folder, dict(tensors), direct
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.chunks: dict[str, list[Chunk]] = {}
        self._rows: dict[str, list[_Rows]] = {name: [] for name in tensors}
        self._sizes: dict[str, int] = {}
        self._around: list[tuple[str, int, bytes]] = []  # file, offset, bytes between data
        self._files: dict[str, direct.Target] = {}
        nothing = nothing_record()
        self._around.append((NOTHING, 0, nothing))
        self._sizes[NOTHING] = len(nothing)
        self.objects = {key: Chunk((), (), NOTHING, 0, len(nothing)) for key in extra_states(hf)}
        places = adapter_places(adapter, hf)
        for rule in (*family_of(hf).parameters(hf), *adapter):
            place = places.get(rule.name) or stored_at(rule.name, hf)
            dtype = tensors[next(iter(rule.sources))].dtype
            self.shapes[place.key], self.dtypes[place.key] = (*place.leading, *rule.whole), dtype
            for row, rows, name, start in rule.blocks():
                step = max(1, CHUNK_BYTES // tensors[name].row_bytes)
                for first in range(0, rows, step):
                    count = min(step, rows - first)
                    offsets = (*place.index, row + first, *(0 for _ in rule.whole[1:]))
                    sizes = (*(1 for _ in place.index), count, *rule.whole[1:])
                    self._place(place.key, offsets, sizes, dtype, name, start + first)

    @property
    def nbytes(self) -> int:
        return sum(self._sizes.values())

    def is_there(self) -> bool:
        return all(direct.has_size(self.folder / file, size) for file, size in self._sizes.items())

    def open(self) -> None:
        self.folder.mkdir(exist_ok=True)
        for file, size in self._sizes.items():
            self._files[file] = direct.Target(self.folder / file, size, self._direct)
        for file, offset, content in self._around:
            self._files[file].write(offset, torch.frombuffer(bytearray(content), dtype=torch.uint8))

    def write(self, name: str, start: int, data: Tensor) -> None:
        row_bytes = self.tensors[name].row_bytes
        stop = start + len(data) // row_bytes
        for rows in self._rows[name]:
            low, high = max(rows.start, start), min(rows.stop, stop)
            if low < high:
                part = data[(low - start) * row_bytes : (high - start) * row_bytes]
                self._files[rows.file].write(rows.offset + (low - rows.start) * row_bytes, part)

    def sync(self) -> None:
        for file in self._files.values():
            file.sync()

    def close(self) -> None:
        self.sync()
        for file in self._files.values():
            file.close()
        self._files = {}
        write_metadata(self.folder, self.shapes, self.dtypes, self.chunks, self.objects)

    def _place(self, key: str, offsets: Shape, sizes: Shape, dtype: torch.dtype, name: str, start: int) -> None:
        around: Envelope = envelope(dtype, sizes)
        file = next(reversed(self._sizes))
        if file == NOTHING or self._sizes[file] + around.length > FILE_BYTES:
            file = f"__0_{len(self._sizes)}.distcp"
            self._sizes[file] = 0
        data = direct.page_ceil(self._sizes[file] + len(around.head))
        begin, end = data - len(around.head), data + around.nbytes
        self._around += [(file, begin, around.head), (file, end, around.tail)]
        self._sizes[file] = end + len(around.tail)
        self.chunks.setdefault(key, []).append(Chunk(offsets, sizes, file, begin, around.length))
        rows = sizes[len(sizes) - len(self.tensors[name].shape)]
        self._rows[name].append(_Rows(start, start + rows, file, data))
