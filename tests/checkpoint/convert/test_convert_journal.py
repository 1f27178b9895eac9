"""What the journal says is on the disk, is; and it survives being cut anywhere."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megapsft.checkpoint.convert.journal import NAME, Done, Journal, matches

DONE = [Done(f"{number:064x}", number % 3, {f"tensor é {number}": f"{number + 1:064x}"}) for number in range(8)]


def written(folder: Path, count: int = 8) -> bytes:
    """The journal of so many tensors."""
    journal = Journal(folder, "plan", lambda: None, every=0)
    for number, done in enumerate(DONE[:count]):
        journal.add(str(number), done)
    journal.flush()
    journal.close()
    return (folder / NAME).read_bytes()


def test_what_is_written_is_read_again(tmp_path):
    written(tmp_path)
    assert matches(tmp_path, "plan")
    assert Journal(tmp_path, "plan", lambda: None).done == {str(number): done for number, done in enumerate(DONE)}


def test_another_plan_begins_anew(tmp_path):
    written(tmp_path)
    assert not matches(tmp_path, "other")
    assert Journal(tmp_path, "other", lambda: None).done == {}
    assert matches(tmp_path, "other")
    assert not matches(tmp_path, "plan")


def test_cut_anywhere_it_has_the_whole_lines_and_takes_more(tmp_path):
    content = written(tmp_path, 3)
    ends = [at + 1 for at, byte in enumerate(content) if byte == ord("\n")]
    for cut in {*range(0, len(content), 11), *ends, *(end - 1 for end in ends), *(end + 1 for end in ends[:-1])}:
        (tmp_path / NAME).write_bytes(content[:cut])
        lines = sum(end <= cut for end in ends)
        assert matches(tmp_path, "plan") == (lines > 0)
        journal = Journal(tmp_path, "plan", lambda: None, every=0)
        assert list(journal.done) == [str(number) for number in range(lines - 1)]
        journal.add("7", DONE[7])
        journal.close()
        assert list(Journal(tmp_path, "plan", lambda: None).done) == [*(str(number) for number in range(lines - 1)), "7"]


@pytest.mark.parametrize("garbage", [b"\0" * 300 + b"\n", b"\xff\xfe\n", b"{]\n", b"\n"])
def test_after_garbage_nothing_is_believed(garbage, tmp_path):
    content = written(tmp_path, 2)
    (tmp_path / NAME).write_bytes(content + garbage + content.splitlines(keepends=True)[1])
    assert list(Journal(tmp_path, "plan", lambda: None).done) == ["0", "1"]


def test_a_line_is_written_only_when_its_tensor_is_safe(tmp_path):
    """At each sync, what has a line already was there at a sync before."""
    added, safe = [], set()

    def sync():
        lines = (tmp_path / NAME).read_text().splitlines()[1:]
        assert {json.loads(line)["tensor"] for line in lines} <= safe
        safe.update(added)

    journal = Journal(tmp_path, "plan", sync, every=0.01)

    def work(number: int) -> None:
        added.append(str(number))
        journal.add(str(number), DONE[number % 8])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(300)))
    journal.flush()
    journal.close()
    assert set(Journal(tmp_path, "plan", lambda: None).done) == {str(number) for number in range(300)}


def test_not_every_tensor_is_a_sync(tmp_path):
    syncs = []
    journal = Journal(tmp_path, "plan", lambda: syncs.append(1), every=3600)
    for number in range(8):
        journal.add(str(number), DONE[number])
    assert syncs == []
    journal.flush()
    assert syncs == [1]
