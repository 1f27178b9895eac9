"""The weights in the safetensors of a Hugging Face folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megapsft.checkpoint.files.direct import Buffers, Source, as_bytes
from megapsft.checkpoint.files.safetensors import Found, read_header
from megapsft.errors import Refused
from megapsft.models.names import Spelling

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NUMBERED = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")
SHOWN = 5  # names in a message
AS_HERE = Spelling()


class FileWeights:
    """Tensors as safetensors store them; nothing but headers is read until `read` asks for rows.

    Args:
        found: by file, what is in it; or one file.
        direct: read past the page cache where the file system allows.
        spelling: that the names in the files may have; if all of them do, they are here as everywhere else.

    Attributes:
        spelling: that the names in the files have.

    Raises:
        Refused: a truncated or corrupt file.
    """

    def __init__(self, found: Path | Mapping[Path, Mapping[str, Found]], direct: bool = True, spelling: Spelling = AS_HERE):
        if isinstance(found, Path):
            found = {found: read_header(found)}
        self.files = list(found)
        fits = all(spelling.fits(places) for places in found.values())
        self.spelling = spelling if fits else AS_HERE
        self._found: dict[str, tuple[Source, Found]] = {}
        buffers = Buffers()
        for path, places in found.items():
            source = Source(path, buffers, direct)
            self._found |= {self.spelling.here(name): (source, place) for name, place in places.items()}
        self.tensors = {name: place.stored for name, (_, place) in self._found.items()}

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Fill `out`, [stop - start, ...] and contiguous, with rows of the tensor, in the dtype it is stored in."""
        source, place = self._found[name]
        source.read(place.offset + start * place.stored.row_bytes, as_bytes(out))

    def places(self) -> Iterator[tuple[Path, int, int]]:
        """(file, first byte, bytes) of all data."""
        for source, place in self._found.values():
            yield source.path, place.offset, place.stored.nbytes

    def close(self) -> None:
        for source in {id(source): source for source, _ in self._found.values()}.values():
            source.close()


class HFWeights(FileWeights):
    """The safetensors of a Hugging Face folder: model.safetensors, what model.safetensors.index.json lists, or numbered shards.

    Raises:
        Refused: no safetensors (pickles are not read), a file that the index lists but is not there, a truncated or corrupt
            file, tensors that the index lists but their file lacks, or that a file has but the index does not list.
    """

    def __init__(self, model_dir: str | Path, direct: bool = True, spelling: Spelling = AS_HERE):
        super().__init__(_tensors(Path(model_dir)), direct, spelling)


def _tensors(folder: Path) -> dict[Path, dict[str, Found]]:
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return {single: read_header(single)}
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise Refused(str(index), "has no weight_map of tensors to files", "download or copy the folder again")
        return _indexed(index, weight_map)
    if numbered(folder):
        return _numbered(folder, numbered(folder))
    pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))
    if pickles:
        remedy = f"convert it: AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(...) writes safetensors"
        raise Refused(str(pickles[0]), "is a pickle, which can run code when it is read; only safetensors are", remedy)
    raise Refused(str(folder), f"has neither {SINGLE} nor {INDEX}", "name a folder with the weights in it")


def numbered(folder: Path) -> dict[str, tuple[int, int]]:
    """The files of a folder that call themselves `...-00001-of-00003.safetensors`, with their two numbers."""
    matches = {path.name: NUMBERED.search(path.name) for path in sorted(folder.glob("*.safetensors"))}
    return {name: (int(found[1]), int(found[2])) for name, found in matches.items() if found}


def _numbered(folder: Path, files: Mapping[str, tuple[int, int]]) -> dict[Path, dict[str, Found]]:
    """Shards without an index, which say themselves how many they are."""
    wanted = [(number, count) for count in {count for _, count in files.values()} for number in range(1, count + 1)]
    if sorted(files.values()) != sorted(wanted):
        rule = f"has no {INDEX}, and its files {some(list(files))} are not all of one numbering"
        raise Refused(str(folder), rule, "download or copy the folder again, with its index")
    found = {folder / name: read_header(folder / name) for name in files}
    names = [tensor for places in found.values() for tensor in places]
    twice = sorted({tensor for tensor in names if names.count(tensor) > 1}) if len(names) != len(set(names)) else []
    if twice:
        raise Refused(str(folder), f"has tensors in two of its files: {some(twice)}", "download or copy the folder again")
    return found


def _indexed(index: Path, weight_map: Mapping[str, str]) -> dict[Path, dict[str, Found]]:
    found = {}
    files = list(dict.fromkeys(weight_map.values()))
    outside = [file for file in files if Path(file).name != file]
    if outside:
        raise Refused(str(index), f"names {outside[0]}, which is not in its folder", "download or copy the folder again")
    for file in files:
        path = index.parent / file
        if not path.is_file():
            raise Refused(str(path), f"is missing, but {index} lists it", "download or copy the folder again")
        found[path] = read_header(path)
        listed = {name for name, where in weight_map.items() if where == file}
        lacking, more = sorted(listed - set(found[path])), sorted(set(found[path]) - listed)
        if lacking or more:
            rule = f"lacks tensors that {INDEX} lists in it: {some(lacking)}"
            if not lacking:
                rule = f"has tensors that {INDEX} does not list in it: {some(more)}"
            raise Refused(str(path), rule, "download or copy the folder again")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        Refused: there is no such file, or something else in it.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        if path.with_name("adapter_config.json").is_file():
            rule, remedy = "holds adapters, and no model", "name one that they are merged into: `megapsft export RUN --out DIR`"
            raise Refused(str(path.parent), rule, remedy) from None
        raise Refused(str(path), "is missing", "name a complete Hugging Face model folder") from None
    except (ValueError, OSError) as error:
        raise Refused(str(path), f"is not readable JSON ({error})", "download or copy the file again") from None
    if not isinstance(content, dict):
        raise Refused(str(path), f"holds a JSON {type(content).__name__}, not an object", "download or copy the file again")
    return content


def some(names: Sequence[str]) -> str:
    """The first few of the names, for a message."""
    return ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")
