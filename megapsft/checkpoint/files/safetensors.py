"""The safetensors format: a JSON header that says where each tensor lies, then the tensors. Nothing in it can run code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from megapsft.checkpoint.files.direct import PAGE, page_ceil
from megapsft.checkpoint.weights import Stored
from megapsft.errors import Refused

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST_HEADER = 100_000_000  # bytes, as in the reference implementation


class Found(NamedTuple):
    """A tensor in a file."""

    stored: Stored
    offset: int  # of its first byte in the file


def read_header(path: Path) -> dict[str, Found]:
    """Where each tensor of a file lies.

    Raises:
        Refused: the file is truncated, is not safetensors, or holds a dtype that no model here has.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(MOST_HEADER, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        found, end = {}, 8 + length
        for name, entry in sorted(header.items(), key=lambda item: item[1].get("data_offsets", [])):
            if name == "__metadata__":
                continue
            if entry["dtype"] not in DTYPES:
                dtype = entry["dtype"]
                raise Refused(
                    f"{path}: {name}", f"is stored as {dtype}, which no model here has", "use the checkpoint in bfloat16"
                )
            stored = Stored(tuple(entry["shape"]), DTYPES[entry["dtype"]])
            if not all(type(number) is int and number >= 0 for number in (*stored.shape, *entry["data_offsets"])):
                raise ValueError(f"{name} has shape {entry['shape']} and lies at {entry['data_offsets']}")
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            if start != end or stop - start != stored.nbytes:
                raise ValueError(f"{name} lies at bytes {start} to {stop}, where {end} to {end + stored.nbytes} were expected")
            found[name], end = Found(stored, start), stop
        if end != size:
            raise ValueError(f"the tensors take {end} bytes, the file has {size}")
    except Refused:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        rule = f"is truncated or not safetensors ({error})"
        raise Refused(str(path), rule, "download or copy the file again") from None
    return found


class Layout(NamedTuple):
    """A file that is to be written."""

    header: bytes  # with the eight bytes before it
    places: dict[str, Found]
    size: int


def lay_out(tensors: Mapping[str, Stored]) -> Layout:
    """A file of these tensors: data begins at a whole page, and so do tensors of whole pages; the others come after them."""
    # what is stored in more bytes first: a reader may ask for alignment
    order = sorted(tensors, key=lambda name: (tensors[name].nbytes % PAGE != 0, -tensors[name].dtype.itemsize))
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        stored = tensors[name]
        end = offset + stored.nbytes
        header[name] = {"dtype": NAMES[stored.dtype], "shape": list(stored.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    begin = page_ceil(8 + len(text))
    text += b" " * (begin - 8 - len(text))
    places = {name: Found(tensors[name], begin + header[name]["data_offsets"][0]) for name in order}
    return Layout(len(text).to_bytes(8, "little") + text, places, begin + offset)


def shards(tensors: Mapping[str, Stored], most_bytes: int) -> list[dict[str, Stored]]:
    """The tensors in their order, in files of at most so many bytes of data, unless one tensor has more."""
    files: list[dict[str, Stored]] = []
    room = 0
    for name, stored in tensors.items():
        if not files or stored.nbytes > room:
            files.append({})
            room = most_bytes
        files[-1][name] = stored
        room -= stored.nbytes
    return files or [{}]
