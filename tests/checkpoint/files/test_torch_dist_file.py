"""Records and `.metadata` of torch_dist checkpoints: those of torch itself are read, ours are like them, no other code is run."""

from __future__ import annotations

import io
import os
import pickle
import random
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from megapsft.checkpoint.convert.memory import resident
from megapsft.checkpoint.files.direct import Buffers, Source
from megapsft.checkpoint.files.records import Chunk, Records, envelope, nothing_record
from megapsft.checkpoint.files.torch_dist import (
    COMMON,
    FORMAT,
    METADATA,
    check_harmless,
    read_index,
    read_metadata,
    write_metadata,
)
from megapsft.errors import Refused

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]
SIZES = [(1,), (7,), (3, 5), (1, 1, 4, 6), (1024,), (2, 1024), (33, 65), (1, 700, 700)]


def saved(thing: object, checksums: bool = True) -> bytes:
    """What torch.save writes."""
    content, before = io.BytesIO(), torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(checksums)
    try:
        torch.save(thing, content)
    finally:
        torch.serialization.set_crc32_options(before)
    return content.getvalue()


def random_tensor(sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    bits = torch.randint(0, 256, (torch.Size(sizes).numel() * dtype.itemsize,), dtype=torch.uint8)
    return bits.view(dtype).view(sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_an_envelope_around_data_is_what_torch_saves(sizes, dtype):
    tensor = random_tensor(sizes, dtype)
    head, nbytes, tail = envelope(dtype, sizes)
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    assert nbytes == len(data)
    assert head + data + tail == saved(tensor, checksums=False)
    loaded = torch.load(io.BytesIO(head + data + tail), weights_only=True)
    assert torch.equal(loaded.view(torch.uint8), tensor.view(torch.uint8))


def test_an_envelope_takes_no_memory_for_its_data():
    before = resident()
    assert envelope(torch.float32, (2**26,)).nbytes == 2**28
    assert resident() - before < 2**25


def rewritten(record: bytes, order: list[str], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The same entries in a zip file of another maker: not aligned, in another order."""
    content = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(record)) as old, zipfile.ZipFile(content, "w", compression) as new:
        entries = {name.split("/", 1)[1]: old.read(name) for name in old.namelist()}
        for name in order:
            new.writestr(f"archive/{name}", entries[name])
    return content.getvalue()


def made(how: str, tensor: torch.Tensor) -> bytes:
    if how == "with checksums":
        return saved(tensor)
    if how == "without":
        return saved(tensor, checksums=False)
    if how == "not aligned":
        return rewritten(saved(tensor), ["data.pkl", "data/0", "version"])
    if how == "data first":
        return rewritten(saved(tensor), ["version", "data/0", "data.pkl"])
    if how == "a parameter's data":
        return saved(torch.nn.Parameter(tensor, requires_grad=False).data)
    return saved(tensor.clone().requires_grad_(tensor.is_floating_point()).detach())


@pytest.mark.parametrize("how", ["with checksums", "without", "not aligned", "data first", "a parameter's data", "detached"])
def test_the_data_of_any_record_is_found(how, tmp_path):
    pick, content, expected = random.Random(how), b"", []
    for _ in range(24):
        dtype, sizes = pick.choice(DTYPES[:4]), pick.choice(SIZES[:7])
        tensor = random_tensor(sizes, dtype)
        content += pick.randbytes(pick.choice([0, 1, 100, 4096]))
        record = made(how, tensor)
        expected.append((Chunk((0,) * len(sizes), sizes, "file", len(content), len(record)), dtype, tensor))
        content += record
    (tmp_path / "file").write_bytes(content)
    source, records = Source(tmp_path / "file", Buffers()), Records()
    for _ in range(2):  # the second time from what is known
        for chunk, dtype, tensor in expected:
            offset = records.data_offset(source, chunk, dtype)
            data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            assert content[offset : offset + len(data)] == data


class Calls:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    ("record", "rule"),
    [
        (lambda t, _: saved(t.t()), "holds .* where .metadata says .*; save the checkpoint again with contiguous parameters"),
        (lambda t, _: saved(torch.cat([t, t])[4:]), "holds "),  # part of a larger storage
        (lambda t, _: saved(t.half().repeat(1, 2)), "holds "),  # as many bytes
        (lambda t, _: saved(t.view(6, 4)), "holds "),
        (lambda t, _: saved(t[:3].clone()), "holds a damaged record at byte 0 .*72 bytes of data"),
        (lambda t, _: saved([t]), "holds "),
        (lambda t, _: saved({"a": 1}), "holds a damaged record"),
        (lambda t, _: saved(t)[:-100], "holds a damaged record"),
        (lambda t, _: bytes(1000), "holds a damaged record"),
        (lambda t, _: rewritten(saved(t), ["data.pkl", "data/0"], zipfile.ZIP_DEFLATED), "its data is compressed"),
        (lambda t, path: saved([t, Calls(path)]), "would call (posix|nt|os).system when it is read, which no checkpoint needs"),
    ],
)
def test_other_records_are_refused(record, rule, tmp_path):
    content = record(random_tensor((4, 6), torch.float32), tmp_path / "called")
    (tmp_path / "file").write_bytes(content)
    chunk = Chunk((0, 0), (4, 6), "file", 0, len(content))
    with pytest.raises(Refused, match=rule):
        Records().data_offset(Source(tmp_path / "file", Buffers()), chunk, torch.float32)
    assert not (tmp_path / "called").exists()


def test_a_record_like_one_before_it_is_looked_at_all_the_same(tmp_path):
    """As long as the one before, with the same dtype and sizes said of it: but its rows lie otherwise."""
    good, wrong = saved(torch.zeros(4, 4)), saved(torch.zeros(4, 4).t())
    assert len(good) == len(wrong)
    (tmp_path / "file").write_bytes(good + wrong)
    source, records = Source(tmp_path / "file", Buffers()), Records()
    records.data_offset(source, Chunk((0, 0), (4, 4), "file", 0, len(good)), torch.float32)
    with pytest.raises(Refused, match="save the checkpoint again with contiguous parameters"):
        records.data_offset(source, Chunk((0, 0), (4, 4), "file", len(good), len(wrong)), torch.float32)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """One tensor [4, 6] in two chunks, and one object, in our own writing."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    around, nothing = envelope(torch.float32, (2, 6)), nothing_record()
    record = around.head + bytes(around.nbytes) + around.tail
    (folder / "__0_0.distcp").write_bytes(record + record + nothing)
    chunks = [Chunk((row, 0), (2, 6), "__0_0.distcp", number * len(record), len(record)) for number, row in enumerate((0, 2))]
    objects = {"decoder.a._extra_state/shard_0_1": Chunk((), (), "__0_0.distcp", 2 * len(record), len(nothing))}
    write_metadata(folder, {"a.weight": (4, 6)}, {"a.weight": torch.float32}, {"a.weight": chunks}, objects)
    return folder


def test_an_index_is_read_as_it_was_written(checkpoint):
    index = read_index(checkpoint)
    assert (index.shapes, index.dtypes) == ({"a.weight": (4, 6)}, {"a.weight": torch.float32})
    assert [(chunk.offsets, chunk.sizes) for chunk in index.chunks["a.weight"]] == [((0, 0), (2, 6)), ((2, 0), (2, 6))]
    assert list(index.objects) == ["decoder.a._extra_state/shard_0_1"]
    check_harmless(checkpoint, index)


@pytest.mark.filterwarnings("ignore")
def test_what_torch_s_own_writer_made_is_read(tmp_path):
    tensors = {"a.weight": torch.randn(4, 6), "b.bias": torch.randn(5).bfloat16()}
    dcp.save({**tensors, "number": 3}, checkpoint_id=tmp_path, no_dist=True)  # a pathlib.Path, which .metadata then names
    (tmp_path / FORMAT).write_text('{"sharded_backend": "torch_dist"}')
    index, records = read_index(tmp_path), Records()
    assert index.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        [chunk] = index.chunks[name]
        offset = records.data_offset(Source(tmp_path / chunk.file, Buffers()), chunk, tensor.dtype)
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert (tmp_path / chunk.file).read_bytes()[offset : offset + len(data)] == data


class Pretends:
    """Unpickled, it calls a class or function of an allowed module."""

    def __init__(self, what: object, *arguments: object):
        self.what, self.arguments = what, arguments

    def __reduce__(self):
        return self.what, self.arguments


@pytest.mark.parametrize(
    ("thing", "called"),
    [
        (lambda path: Calls(path), "system"),
        (lambda path: Metadata({"a": Calls(path)}), "system"),
        (lambda path: Metadata({}, planner_data=Calls(path)), "system"),
        (lambda path: Pretends(eval, f"open({str(path)!r}, 'w')"), "builtins.eval"),
        (lambda path: Pretends(torch.load, str(path)), "torch.serialization.load"),
        (lambda path: Pretends(getattr, dcp.filesystem, "os"), "builtins.getattr"),
        (lambda path: Pretends(torch.hub.load, "a/b", "c"), "torch.hub.load"),
    ],
)
def test_metadata_that_calls_something_else_is_refused_without_calling_it(thing, called, checkpoint, tmp_path):
    try:
        content = pickle.dumps(thing(tmp_path / "called"))
    except TypeError:  # a module cannot be pickled: write by hand what fetches it
        content = b"cbuiltins\ngetattr\n(ctorch.distributed.checkpoint.filesystem\nos\nVsystem\ntR."
    (checkpoint / METADATA).write_bytes(content)
    with pytest.raises(Refused, match=rf"would call .*{called} when it is read.*only if you trust where it comes from"):
        read_index(checkpoint)
    assert not (tmp_path / "called").exists()


def test_names_with_dots_reach_nothing_behind_an_allowed_one(checkpoint):
    module, name = b"torch.distributed.checkpoint.metadata", b"Metadata.__init__.__globals__"
    content = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(text)]) + text for text in (module, name)) + b"\x93."
    (checkpoint / METADATA).write_bytes(content)
    with pytest.raises(Refused, match="would call torch.distributed.checkpoint.metadata.Metadata.__init__.__globals__"):
        read_index(checkpoint)


@pytest.mark.parametrize("seed", range(30))
def test_damaged_metadata_is_refused(seed, checkpoint):
    pick, content = random.Random(seed), bytearray((checkpoint / METADATA).read_bytes())
    good = read_index(checkpoint)
    if seed % 3 == 0:
        del content[pick.randrange(len(content)) :]
    else:
        for _ in range(seed % 3 * 4):
            content[pick.randrange(len(content))] = pick.randrange(256)
    (checkpoint / METADATA).write_bytes(content)
    try:
        found = read_index(checkpoint)
    except Refused:
        return
    assert type(found) is type(good)  # what was changed may be a number that means something else


def change(checkpoint: Path, edit) -> None:
    found = read_metadata(checkpoint)
    edit(found)
    (checkpoint / METADATA).write_bytes(pickle.dumps(found))


def with_info(**values):
    def edit(found):
        info = next(iter(found.storage_data.values()))
        for name, value in values.items():
            setattr(info, name, value)

    return edit


def with_chunks(*chunks):
    def edit(found):
        found.state_dict_metadata["a.weight"].chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in chunks]

    return edit


def lose_one(found):
    found.storage_data.pop(MetadataIndex("a.weight", torch.Size((2, 0)), 1))


@pytest.mark.parametrize(
    ("edit", "rule"),
    [
        (with_info(relative_path="../elsewhere.distcp"), r"names \.\./elsewhere.distcp, which is not in the folder"),
        (with_info(relative_path="/etc/passwd"), "names /etc/passwd, which is not in the folder"),
        (with_info(relative_path="a/../../b"), r"names a/\.\./\.\./b, which is not in the folder"),
        (with_info(relative_path=3), "is damaged"),
        (with_info(offset=-1), "is damaged"),
        (with_info(offset=None), "is damaged"),
        (with_info(length="3"), "is damaged"),
        (with_info(transform_descriptors=["zstd"]), r"is stored with \['zstd'\], which is not read here"),
        (with_chunks(((0, 0), (2, 6))), "has chunks that its .metadata does not place"),
        (with_chunks(((0, 0), (2, 6)), ((1, 0), (2, 6))), "has chunks that its .metadata does not place"),
        (with_chunks(((0, 0), (2, 6)), ((2, 0), (3, 6))), "is damaged .*a.weight has a chunk"),
        (with_chunks(((0, 0), (2, 6)), ((2, 0), (2,))), "is damaged"),
        (lose_one, "has chunks that its .metadata does not place"),
        (lambda found: setattr(found, "state_dict_metadata", None), "is damaged"),
    ],
)
def test_metadata_that_lies_is_refused(edit, rule, checkpoint):
    change(checkpoint, edit)
    with pytest.raises(Refused, match=rule):
        read_index(checkpoint)


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (None, f"is not a whole torch_dist checkpoint .no {FORMAT}.; name a folder such as RUN/checkpoints/latest"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"sharded_backend": "zarr"}', "names the format 'zarr'; only torch_dist is read"),
    ],
)
def test_other_formats_are_refused(content, rule, checkpoint):
    (checkpoint / FORMAT).unlink()
    if content is not None:
        (checkpoint / FORMAT).write_text(content)
    with pytest.raises(Refused, match=rule):
        read_index(checkpoint)


def test_half_a_checkpoint_is_refused(checkpoint):
    (checkpoint / METADATA).unlink()
    with pytest.raises(Refused, match=f"is not a whole torch_dist checkpoint .no {METADATA}."):
        read_index(checkpoint)


def test_common_state_and_extra_states_that_call_something_are_refused_without_calling_it(checkpoint, tmp_path):
    torch.save({"iteration": Calls(tmp_path / "called")}, checkpoint / COMMON)
    with pytest.raises(Refused, match=f"{COMMON}: is not made of plain values and tensors"):
        check_harmless(checkpoint, read_index(checkpoint))

    write_common = {"iteration": 0, "args": None}
    torch.save(write_common, checkpoint / COMMON)
    check_harmless(checkpoint, read_index(checkpoint))
    record = saved([Calls(tmp_path / "called")])
    (checkpoint / "__0_1.distcp").write_bytes(record)

    def point(found):
        info = found.storage_data[MetadataIndex("decoder.a._extra_state/shard_0_1")]
        info.relative_path, info.offset, info.length = "__0_1.distcp", 0, len(record)

    change(checkpoint, point)
    with pytest.raises(Refused, match="decoder.a._extra_state/shard_0_1: is not made of plain values and tensors"):
        check_harmless(checkpoint, read_index(checkpoint))
    assert not (tmp_path / "called").exists()


def with_state(checkpoint: Path, state: object) -> None:
    """A layer's `_extra_state` as Transformer Engine gives it to Megatron: a pickle in a tensor of bytes."""
    record = saved(torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8))
    (checkpoint / "__0_1.distcp").write_bytes(record)

    def point(found):
        info = found.storage_data[MetadataIndex("decoder.a._extra_state/shard_0_1")]
        info.relative_path, info.offset, info.length = "__0_1.distcp", 0, len(record)

    change(checkpoint, point)


@pytest.mark.parametrize("name", ["DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling"])
def test_states_that_transformer_engine_pickled_are_read_without_it(name, checkpoint, monkeypatch):
    """Before 2.18 layers pickle whatever recipe they compute by. Here its class cannot be imported."""
    recipe = type(name, (), {"__module__": "transformer_engine.common.recipe"})
    monkeypatch.setitem(sys.modules, "transformer_engine.common.recipe", SimpleNamespace(**{name: recipe}))
    monkeypatch.setitem(sys.modules, "transformer_engine.common", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "transformer_engine", SimpleNamespace())
    with_state(checkpoint, {"recipe": recipe(), "amax_history_fwd": torch.ones(4, 3), "extra_fp8_variables": {"num_gemms": 1}})
    for name in ("", ".common", ".common.recipe"):
        monkeypatch.delitem(sys.modules, f"transformer_engine{name}")
    check_harmless(checkpoint, read_index(checkpoint))


def safe_load_from_bytes(content: bytes) -> object:
    """From 0.18 on importing Megatron puts a function of its own of this name in the place of torch's."""


def test_tensors_in_states_are_read_as_newer_megatron_has_them_pickled(checkpoint, monkeypatch):
    with monkeypatch.context() as newer:
        newer.setattr(safe_load_from_bytes, "__module__", "megatron.core.safe_globals")
        newer.setitem(sys.modules, "megatron.core.safe_globals", SimpleNamespace(safe_load_from_bytes=safe_load_from_bytes))
        newer.setattr(torch.storage, "_load_from_bytes", safe_load_from_bytes)
        with_state(checkpoint, {"amax_history_fwd": torch.ones(4, 3)})
    check_harmless(checkpoint, read_index(checkpoint))


def test_states_that_name_anything_else_are_refused_without_calling_it(checkpoint, tmp_path):
    with_state(checkpoint, {"recipe": Calls(tmp_path / "called")})
    with pytest.raises(Refused, match="decoder.a._extra_state/shard_0_1: .* .it names posix.system."):
        check_harmless(checkpoint, read_index(checkpoint))
    assert not (tmp_path / "called").exists()


def test_without_a_file_of_the_common_state_objects_are_still_looked_at(checkpoint, tmp_path):
    """As Megatron-Core 0.19 writes checkpoints: the common state is one of the objects."""
    (checkpoint / COMMON).unlink()
    check_harmless(checkpoint, read_index(checkpoint))
    record = saved([{"iteration": Calls(tmp_path / "called")}])
    (checkpoint / "__0_1.distcp").write_bytes(record)
    place = Chunk((), (), "__0_1.distcp", 0, len(record))
    index = read_index(checkpoint)._replace(objects={"common_state/shard_0_1": place})
    with pytest.raises(Refused, match="common_state/shard_0_1: is not made of plain values and tensors"):
        check_harmless(checkpoint, index)
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("content", [b"", b"no zip", saved({"iteration": 0})[:-50]])
def test_a_damaged_common_state_is_refused(content, checkpoint):
    (checkpoint / COMMON).write_bytes(content)
    with pytest.raises(Refused, match=COMMON):
        check_harmless(checkpoint, read_index(checkpoint))
