"""Reads and writes at any place give what ordinary ones give, past the page cache or through it."""

from __future__ import annotations

import errno
import gc
import os
import random

import pytest
import torch

from megapsft.checkpoint.files import direct
from megapsft.checkpoint.files.direct import PAGE, Buffers, Source, Target, as_bytes, new_buffer, page_ceil, page_floor
from megapsft.errors import Refused

WAYS = ["direct", "buffered", "direct I/O refused when opened", "direct I/O refused when used", "a little at a time"]
EDGES = [0, 1, 511, 512, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 5 * PAGE + 7]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch) -> bool:
    """The argument `direct`; what the file system answers is made up where it is to refuse."""
    if request.param == "direct I/O refused when opened":
        monkeypatch.setattr(direct, "_open_direct", lambda path, flags: None)
    if request.param == "direct I/O refused when used":
        for name in ("preadv", "pwritev"):
            monkeypatch.setattr(direct.os, name, refusing(getattr(os, name)))
    if request.param == "a little at a time":
        for name in ("preadv", "pwritev"):
            monkeypatch.setattr(direct.os, name, a_little(getattr(os, name)))
    return request.param != "buffered"


def a_little(function):
    """As of a disk over a network, which does less than it is asked to; how much is known to no alignment."""

    def call(descriptor, views, at):
        return max(min(1, len(views[0])), function(descriptor, views, at) * 2 // 3)

    return call


def refusing(function):
    """As of a file system that opens files for direct I/O, and refuses it later."""
    import fcntl

    def call(descriptor, *rest):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O here")
        return function(descriptor, *rest)

    return call


def places(size: int, seed: int, count: int = 60):
    """(offset, length) in a file of `size` bytes: the edges of pages, and any."""
    pick = random.Random(seed)
    for _ in range(count):
        offset = pick.choice([pick.choice(EDGES), pick.randrange(size)])
        length = pick.choice([pick.choice(EDGES), pick.randrange(size), size - offset])
        if 0 <= offset <= size and offset + length <= size:
            yield offset, length


@pytest.mark.parametrize("size", [PAGE - 1, 4 * PAGE, 37 * PAGE + 411])
def test_any_place_is_read(way, size, tmp_path):
    content = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(content)
    source = Source(tmp_path / "file", Buffers(), way)
    for offset, length in places(size, size):
        for out in (new_buffer(length), torch.zeros(length + 1, dtype=torch.uint8)[1:]):  # at a page of memory, and not
            source.read(offset, out)
            assert out.numpy().tobytes() == content[offset : offset + length], (offset, length)
    source.close()


@pytest.mark.parametrize("size", [PAGE - 1, 4 * PAGE, 37 * PAGE + 411])
def test_any_place_is_written_and_no_other(way, size, tmp_path):
    expected = bytearray(size)
    target = Target(tmp_path / "file", size, way)
    for number, (offset, length) in enumerate(places(size, size + 1)):
        content = random.Random(number).randbytes(length)
        expected[offset : offset + length] = content
        for data in (new_buffer(length), torch.zeros(length + 1, dtype=torch.uint8)[1:]):
            data.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8) if length else torch.empty(0, dtype=torch.uint8))
            target.write(offset, data)
    target.sync()
    target.close()
    assert (tmp_path / "file").read_bytes() == expected


def test_whole_pages_are_written_past_the_cache_where_that_is_possible(tmp_path, monkeypatch):
    """Else the tests above would pass without any direct I/O."""
    used, plain = [], os.pwritev
    monkeypatch.setattr(direct.os, "pwritev", lambda descriptor, *rest: used.append(descriptor) or plain(descriptor, *rest))
    target = Target(tmp_path / "file", 4 * PAGE)
    target.write(0, new_buffer(3 * PAGE - 1))
    assert used == [descriptor for descriptor in (target._direct, target._plain) if descriptor is not None]


@pytest.mark.parametrize("offset", [0, 100, PAGE, 2 * PAGE])
def test_what_lies_after_the_end_is_refused(way, offset, tmp_path):
    size = 2 * PAGE + 100
    (tmp_path / "file").write_bytes(bytes(size))
    source = Source(tmp_path / "file", Buffers(), way)
    with pytest.raises(Refused, match=f"ends after {size} bytes; {offset + 3 * PAGE} were to be there; download or copy"):
        source.read(offset, new_buffer(3 * PAGE))


def test_a_file_that_shrinks_while_it_is_read_is_refused(way, tmp_path):
    (tmp_path / "file").write_bytes(bytes(4 * PAGE))
    source = Source(tmp_path / "file", Buffers(), way)
    os.truncate(tmp_path / "file", 100)
    with pytest.raises(Refused, match=f"; {4 * PAGE} were to be there"):
        source.read(0, new_buffer(4 * PAGE))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_refused_before_anything_is_written(code, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(direct.os, "posix_fallocate", full)
    with pytest.raises(Refused, match="cannot grow: .*; free some space, or write to another disk; run the same command again"):
        Target(tmp_path / "file", 10 * PAGE)
    assert (tmp_path / "file").stat().st_size == 0


def test_what_another_attempt_wrote_is_kept_where_the_size_is_the_same(tmp_path):
    first = Target(tmp_path / "file", 3 * PAGE)
    first.write(PAGE, as_bytes(torch.full((PAGE,), 7, dtype=torch.uint8)))
    first.close()
    Target(tmp_path / "file", 3 * PAGE).close()
    assert (tmp_path / "file").read_bytes()[PAGE : 2 * PAGE] == bytes([7]) * PAGE
    Target(tmp_path / "file", 3 * PAGE + 1).close()
    assert not any((tmp_path / "file").read_bytes())


def test_threads_have_buffers_of_their_own_and_grow_them():
    from concurrent.futures import ThreadPoolExecutor

    buffers = Buffers()
    first = buffers.take(10)
    assert buffers.take(5).data_ptr() == first.data_ptr()
    assert len(buffers.take(10 * PAGE)) == 10 * PAGE
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(buffers.take, 10).result()
    assert other.data_ptr() != buffers.take(10).data_ptr()
    assert first.data_ptr() % PAGE == other.data_ptr() % PAGE == 0


def test_pages():
    for offset in EDGES:
        assert page_floor(offset) <= offset <= page_ceil(offset) < offset + PAGE
        assert page_floor(offset) % PAGE == page_ceil(offset) % PAGE == 0


def test_files_are_closed_when_nobody_has_them_any_more(tmp_path):
    (tmp_path / "file").write_bytes(bytes(10))
    gc.collect()  # what tests before this one left
    before = os.listdir("/proc/self/fd")
    for _ in range(5):
        Source(tmp_path / "file", Buffers())
        Target(tmp_path / "file", 10)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == len(before)
