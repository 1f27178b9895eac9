"""Our headers are read by the `safetensors` library, and its by us; a header that lies is refused before anything is read."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megapsft.checkpoint.files.direct import PAGE, as_bytes
from megapsft.checkpoint.files.safetensors import DTYPES, lay_out, read_header, shards
from megapsft.checkpoint.weights import Stored
from megapsft.errors import Refused


def some_tensors(seed: int) -> dict[str, torch.Tensor]:
    """Of all dtypes and ranks, with tensors of whole pages, of single elements and of none."""
    pick, bits = random.Random(seed), torch.Generator().manual_seed(seed)
    tensors = {}
    for number in range(pick.randrange(1, 12)):
        dtype = pick.choice(list(DTYPES.values()))
        shape = pick.choice([(), (1,), (0, 3), (pick.randrange(1, 50), pick.randrange(1, 50)), (2, PAGE), (3, 2, 5)])
        count = max(1, torch.Size(shape).numel()) * dtype.itemsize
        tensors[f'tensor "{number}" é'] = (
            torch.randint(0, 256, (count,), dtype=torch.uint8, generator=bits)
            .view(dtype)[: torch.Size(shape).numel()]
            .view(shape)
        )
    return tensors


@pytest.mark.parametrize("seed", range(20))
def test_the_library_reads_our_layout(seed, tmp_path):
    tensors = some_tensors(seed)
    layout = lay_out({name: Stored(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()})
    content = bytearray(layout.size)
    content[: len(layout.header)] = layout.header
    for name, place in layout.places.items():
        content[place.offset : place.offset + place.stored.nbytes] = as_bytes(tensors[name]).numpy().tobytes()
        assert place.offset % PAGE == 0 or place.stored.nbytes % PAGE
    (tmp_path / "file").write_bytes(content)
    assert same(load_file(tmp_path / "file"), tensors)
    assert read_header(tmp_path / "file") == layout.places


@pytest.mark.parametrize("seed", range(20))
def test_we_read_the_library_s_layout(seed, tmp_path):
    tensors = some_tensors(seed)
    save_file(tensors, tmp_path / "file", metadata={"format": "pt"})
    content = (tmp_path / "file").read_bytes()
    found = read_header(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, (stored, offset) in found.items():
        assert stored == Stored(tuple(tensors[name].shape), tensors[name].dtype)
        assert content[offset : offset + stored.nbytes] == as_bytes(tensors[name]).numpy().tobytes()


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    alike = [
        found[name].dtype == tensor.dtype
        and found[name].shape == tensor.shape
        and torch.equal(as_bytes(found[name]), as_bytes(tensor))
        for name, tensor in expected.items()
    ]
    return found.keys() == expected.keys() and all(alike)


def write(path: Path, header: object, data: int = 24, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data))
    return path


def entry(start: int, stop: int, shape: object = (3,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


GOOD = {"a": entry(0, 12), "b": entry(12, 24)}


def test_the_header_that_the_others_are_made_of_is_read(tmp_path):
    assert read_header(write(tmp_path / "file", GOOD)).keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("header", "options"),
    [
        (GOOD, dict(data=23)),
        (GOOD, dict(data=25)),
        (GOOD, dict(length=10**12)),
        (GOOD, dict(length=2**63)),
        (GOOD, dict(length=0)),
        (b"", dict(data=0)),
        (b"{", {}),
        (b"[" * 100_000, {}),
        (b"\xff\xfe", {}),
        ([GOOD], {}),
        ({"a": 3}, {}),
        ({"a": entry(0, 12), "b": entry(0, 12)}, dict(data=12)),  # one on the other
        ({"a": entry(0, 12), "b": entry(16, 28)}, dict(data=28)),  # a hole
        ({"a": entry(12, 24)}, {}),
        ({"a": entry(0, 8), "b": entry(8, 24)}, {}),
        ({"a": entry(0, 24, [-3, -2])}, {}),
        ({"a": entry(0, 12), "b": entry(12, 4, [-2]), "c": entry(4, 24, [5])}, {}),
        ({"a": entry(0, 24, [6.0])}, {}),
        ({"a": entry(0, 24, [True, 6])}, {}),
        ({"a": entry(0, 24, "6")}, {}),
        ({"a": entry(0, 24, 6)}, {}),
        ({"a": {**entry(0, 24, [6]), "data_offsets": [0, 24.0]}}, {}),
        ({"a": {**entry(0, 24, [6]), "data_offsets": [0]}}, {}),
        ({"a": {"dtype": "F32", "shape": [6]}}, {}),
        ({"a": {"shape": [6], "data_offsets": [0, 24]}}, {}),
    ],
)
def test_a_header_that_lies_is_refused(header, options, tmp_path):
    path = write(tmp_path / "file", header, **options)
    with pytest.raises(Refused) as refusal:
        read_header(path)
    assert str(refusal.value).startswith(f"{path}: is truncated or not safetensors (")
    assert str(refusal.value).endswith("; download or copy the file again")


def test_a_dtype_of_no_model_is_refused_by_its_name(tmp_path):
    path = write(tmp_path / "file", {"ids": entry(0, 24, [3], "I64")})
    with pytest.raises(Refused) as refusal:
        read_header(path)
    assert str(refusal.value) == f"{path}: ids: is stored as I64, which no model here has; use the checkpoint in bfloat16"


@pytest.mark.parametrize("most", [1, 100, 400, 10**9])
def test_files_have_no_more_than_they_may_unless_it_is_one_tensor(most):
    tensors = {str(number): Stored((number,), torch.float32) for number in range(1, 60)}
    files = shards(tensors, most)
    assert [name for file in files for name in file] == list(tensors)
    for file, after in zip(files, [*files[1:], None], strict=True):
        size = sum(stored.nbytes for stored in file.values())
        assert size <= most or len(file) == 1
        assert after is None or size + next(iter(after.values())).nbytes > most
