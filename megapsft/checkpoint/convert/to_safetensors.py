"""A folder of safetensors as Hugging Face has them: one file, or several and their index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megapsft.checkpoint.files import direct
from megapsft.checkpoint.files.safetensors import Found, Layout, lay_out, shards
from megapsft.checkpoint.weights import Stored
from megapsft.checkpoint.weights.hf import AS_HERE, INDEX, SINGLE
from megapsft.checkpoint.weights.lora import TENSORS as ADAPTER_TENSORS
from megapsft.models.names import Spelling

ADAPTER = "adapter"  # the folder beside the base
ADAPTER_FILE = f"{ADAPTER}/{ADAPTER_TENSORS}"


class SafetensorsTarget:
    """Implements Target.

    Args:
        folder: that the files go to; it is there.
        tensors: in the order of the files.
        max_shard_bytes: a file has no more data than this, unless it is one tensor.
        direct: write past the page cache where the file system allows.
        apart: by file, tensors that go to one of their own, such as an adapter, as PEFT has it.
        spelling: of the names in the files.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, Stored],
        max_shard_bytes: int,
        direct: bool = True,
        apart: Mapping[str, Mapping[str, Stored]] | None = None,
        spelling: Spelling = AS_HERE,
    ):
        apart = apart or {}
        self.folder, self.tensors, self._direct = folder, dict(tensors), direct
        self._spelling = spelling
        parts = shards(tensors, max_shard_bytes) if tensors else []
        names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
        if len(parts) == 1:
            names = [SINGLE]
        self.layouts: dict[str, Layout] = {}
        self._places: dict[str, tuple[str, Found]] = {}
        self._indexed = list(tensors) if len(parts) > 1 else []
        for name, part in (*zip(names, parts, strict=True), *apart.items()):
            layout = self.layouts[name] = lay_out({spelling.there(tensor): stored for tensor, stored in part.items()})
            self._places |= {tensor: (name, layout.places[spelling.there(tensor)]) for tensor in part}
            self.tensors |= part
        self._files: dict[str, direct.Target] = {}

    @property
    def nbytes(self) -> int:
        return sum(layout.size for layout in self.layouts.values())

    def is_there(self) -> bool:
        return all(direct.has_size(self.folder / name, layout.size) for name, layout in self.layouts.items())

    def open(self) -> None:
        for name, layout in self.layouts.items():
            (self.folder / name).parent.mkdir(exist_ok=True)
            self._files[name] = direct.Target(self.folder / name, layout.size, self._direct)
            self._files[name].write(0, torch.frombuffer(bytearray(layout.header), dtype=torch.uint8))

    def write(self, name: str, start: int, data: Tensor) -> None:
        file, place = self._places[name]
        self._files[file].write(place.offset + start * place.stored.row_bytes, data)

    def sync(self) -> None:
        for file in self._files.values():
            file.sync()

    def close(self) -> None:
        self.sync()
        for file in self._files.values():
            file.close()
        self._files = {}
        if self._indexed:
            total = sum(self.tensors[tensor].nbytes for tensor in self._indexed)
            spelt = {self._spelling.there(tensor): tensor for tensor in self._indexed}
            weight_map = {name: self._places[spelt[name]][0] for name in sorted(spelt)}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
