"""The weights of a model in a torch_dist checkpoint, whatever split wrote it, as Hugging Face tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from megapsft.checkpoint.files.direct import Buffers, Source, as_bytes
from megapsft.checkpoint.files.records import Chunk, Records
from megapsft.checkpoint.files.torch_dist import Index, read_index
from megapsft.checkpoint.weights import Shape, Stored
from megapsft.checkpoint.weights.hf import some
from megapsft.errors import Refused
from megapsft.models.adapters import adapter_rules, is_adapter, stored_ranks
from megapsft.models.families import family_of
from megapsft.models.hf_config import HFConfig
from megapsft.models.parameters import Block, Box, Rule, gather
from megapsft.models.stored_names import is_weight, spellings


class _Parameter(NamedTuple):
    """Where the parameter of a rule lies."""

    key: str
    blocks: list[Block]
    boxes: list[Box]
    chunks: list[Chunk]


class DistWeights:
    """Tensors that the parameters of a checkpoint are made of; the vocabulary without its padding.

    Args:
        folder: with `.metadata` in it.
        hf: config of the model that it is a checkpoint of.
        direct: read past the page cache where the file system allows.
        adapter: the LoRA adapter that is kept beside the model, under PEFT's names, instead of the model.

    Raises:
        Refused: what `read_index` refuses; parameters that are missing, not covered by their chunks, covered twice, of another
            shape than the config says, or that the family does not know.
    """

    def __init__(self, folder: Path, hf: HFConfig, direct: bool = True, adapter: bool = False):
        self.folder = folder
        self.tensors: dict[str, Stored] = {}
        self._of: dict[str, _Parameter] = {}
        self._records, self._buffers, self._rooms = Records(), Buffers(), Buffers()
        index = read_index(folder)
        self.dtypes = index.dtypes
        used: dict[str, set[int]] = {}
        places: dict[str, dict[Shape, list[int]]] = {}  # of each key: layer (and expert) -> numbers of its chunks
        rules = adapter_rules(hf, stored_ranks(index.shapes, hf)) if adapter else family_of(hf).parameters(hf)
        self.has_adapter = any(is_adapter(key) for key in index.shapes)
        missing = []
        for rule in rules:
            place = next((place for place in spellings(rule.name, hf) if place.key in index.shapes), None)
            if place is None:
                missing.append(rule.name)
                continue
            self._check_shape(rule, place.key, place.leading, index.shapes[place.key])
            lead = len(place.index)
            if place.key not in places:
                places[place.key] = _by_place(index.chunks[place.key], lead)
            inside = places[place.key].get(place.index, [])
            used.setdefault(place.key, set()).update(inside)
            parameter = self._parameter(rule, index, place.key, inside, lead)
            for name, size in rule.sources.items():
                self.tensors[name] = Stored(size, index.dtypes[place.key])
                self._of[name] = parameter
        if missing:
            rule = f"lacks {len(missing)} parameters of {hf.architecture}: {some(missing)}"
            raise Refused(str(folder), rule, "name a checkpoint of the model that config.json describes")
        mine = [key for key in index.shapes if is_weight(key) and is_adapter(key) == adapter]
        extra = [key for key in mine if len(used.get(key, ())) < len(index.chunks[key])]
        if extra:
            rule = f"holds {len(extra)} parameters that {hf.architecture} does not have: {some(extra)}"
            raise Refused(str(folder), rule, "name the config.json of the model that the checkpoint is of")
        files = {chunk.file for parameter in self._of.values() for chunk in parameter.chunks}
        for file in sorted(files):
            if not (folder / file).is_file():
                raise Refused(str(folder / file), "is missing, but .metadata lists it", "copy the checkpoint again")
        self.files = [folder / file for file in sorted(files)]
        self._sources = {path.name: Source(path, self._buffers, direct) for path in self.files}
        self._check_ends()

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Fill `out`, [stop - start, ...] and contiguous, with rows of the tensor, in the dtype it is stored in."""
        parameter, dtype = self._of[name], self.tensors[name].dtype

        def fill(number: int, first: int, last: int, into: Tensor) -> None:
            chunk, box = parameter.chunks[number], parameter.boxes[number]
            source = self._sources[chunk.file]
            row_bytes = box.columns * dtype.itemsize
            offset = self._records.data_offset(source, chunk, dtype) + (first - box.row) * row_bytes
            if into.is_contiguous():
                source.read(offset, as_bytes(into))
                return
            room = self._rooms.take((last - first) * row_bytes)
            source.read(offset, room)
            into.copy_(room.view(dtype).view(last - first, box.columns))

        gather(parameter.blocks, name, start, parameter.boxes, fill, out)

    def places(self) -> Iterator[tuple[Path, int, int]]:
        """(file, first byte, bytes) of all data."""
        for parameter in {id(parameter): parameter for parameter in self._of.values()}.values():
            dtype = self.dtypes[parameter.key]
            for chunk in parameter.chunks:
                source = self._sources[chunk.file]
                yield source.path, self._records.data_offset(source, chunk, dtype), math.prod(chunk.sizes) * dtype.itemsize

    def close(self) -> None:
        for source in self._sources.values():
            source.close()

    def _parameter(self, rule: Rule, index: Index, key: str, inside: list[int], lead: int) -> _Parameter:
        chunks = [index.chunks[key][number] for number in inside]
        boxes = [_box(chunk, lead) for chunk in chunks]
        if any(math.prod(chunk.sizes[:lead]) != 1 for chunk in chunks):
            rule_text = "has chunks of several layers or experts in one"
            raise Refused(f"{self.folder}: {key}", rule_text, "save the checkpoint with Megatron's own layers")
        rows, columns = rule.whole[0], math.prod(rule.whole[1:])
        covered = sum(max(0, min(box.row + box.rows, rows) - box.row) * box.columns for box in boxes)
        overlap = any(_overlap(a, b) for n, a in enumerate(boxes) for b in boxes[:n])
        if covered != rows * columns or overlap:
            rule_text = f"is covered by its chunks for {covered} of {rows * columns} elements" + (", some twice" * overlap)
            raise Refused(f"{self.folder}: {rule.name}", rule_text, "copy the checkpoint again, or use another one")
        return _Parameter(key, rule.blocks(), boxes, chunks)

    def _check_shape(self, rule: Rule, key: str, leading: Shape, shape: Shape) -> None:
        wanted = (*leading, *rule.whole)
        padded = rule.padded and len(shape) == len(wanted) and shape[0] >= wanted[0] and shape[1:] == wanted[1:]
        if shape != wanted and not padded:
            text = f"has shape {list(shape)}, but config.json makes it {list(wanted)}"
            raise Refused(f"{self.folder}: {key}", text, "name the config.json of the model that the checkpoint is of")

    def _check_ends(self) -> None:
        """That no file ends before its last record, before anything is read."""
        ends: dict[str, int] = {}
        for parameter in self._of.values():
            for chunk in parameter.chunks:
                ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.offset + chunk.length)
        for file, end in ends.items():
            size = self._sources[file].size
            if size < end:
                rule = f"has {size} bytes, but .metadata lists {end}: it is truncated"
                raise Refused(str(self.folder / file), rule, "copy the checkpoint again")


def _by_place(chunks: Sequence[Chunk], lead: int) -> dict[Shape, list[int]]:
    """Numbers of the chunks that begin at each index of the first `lead` axes."""
    found: dict[Shape, list[int]] = {}
    for number, chunk in enumerate(chunks):
        found.setdefault(chunk.offsets[:lead], []).append(number)
    return found


def _box(chunk: Chunk, lead: int) -> Box:
    offsets, sizes = chunk.offsets[lead:], chunk.sizes[lead:]
    if len(sizes) == 1:
        return Box(offsets[0], sizes[0], 0, 1)
    return Box(offsets[0], sizes[0], offsets[1], sizes[1])


def _overlap(a: Box, b: Box) -> bool:
    rows = max(a.row, b.row) < min(a.row + a.rows, b.row + b.rows)
    return rows and max(a.column, b.column) < min(a.column + a.columns, b.column + b.columns)
