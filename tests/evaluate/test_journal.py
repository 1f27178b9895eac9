"""The journal of responses: what a kill leaves is taken up, and nothing else's is touched."""

import json
import multiprocessing

import pytest

from megapsft.errors import Refused
from megapsft.evaluate.journal import Journal

OPTIONS = {"n": 2, "sampling": (1, 2)}


def line(row, number=0):
    return {"row": row, "number": number, "rollouts": []}


def test_what_was_written_is_there_when_it_is_opened_again(tmp_path):
    path = tmp_path / "folder" / "a.jsonl"
    with Journal(path, OPTIONS) as journal:
        journal.write(line(3, 1))
        journal.sync()
        assert journal.done == {(3, 1)}
    with Journal(path, OPTIONS) as journal:
        assert (journal.done, list(journal.read())) == ({(3, 1)}, [line(3, 1)])
        journal.write(line(0))
    assert [json.loads(text) for text in path.read_text().splitlines()] == [line(3, 1), line(0)]
    assert json.loads(path.with_suffix(".json").read_text()) == {"n": 2, "sampling": [1, 2]}


@pytest.mark.parametrize("torn", ['{"row": 1, "nu', '{"row": 1, "number": 0, "rollouts": []}', "{"])
def test_half_a_line_is_cut_and_written_anew(torn, tmp_path):
    path = tmp_path / "a.jsonl"
    with Journal(path, OPTIONS) as journal:
        journal.write(line(0))
    with path.open("a") as file:
        file.write(torn)
    with Journal(path, OPTIONS) as journal:
        assert journal.done == {(0, 0)}
        journal.write(line(1))
    assert [json.loads(text) for text in path.read_text().splitlines()] == [line(0), line(1)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n": 3, "sampling": (1, 2)}, "n=3: differs from the 2 that"),
        ({"n": 2}, "sampling=None: differs from the [1, 2] that"),
        (OPTIONS | {"new": 1}, "new=1: differs from the None that"),
    ],
)
def test_other_options_are_refused_and_change_nothing(options, said, tmp_path):
    path = tmp_path / "a.jsonl"
    with Journal(path, OPTIONS) as journal:
        journal.write(line(0))
    before = path.read_bytes(), path.with_suffix(".json").read_bytes()
    with pytest.raises(Refused) as refused:
        Journal(path, options)
    assert said in str(refused.value)
    assert before == (path.read_bytes(), path.with_suffix(".json").read_bytes())


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "?"}\n')
    with pytest.raises(Refused, match=r"without a\.json that says how it was made"):
        Journal(path, OPTIONS)
    path.with_suffix(".json").write_text(json.dumps(OPTIONS))
    with pytest.raises(Refused, match=r"a\.jsonl:1: is not a line that this command writes"):
        Journal(path, OPTIONS)
    path.with_suffix(".json").write_text("[]")
    with pytest.raises(Refused, match=r"a\.json: holds no options"):
        Journal(path, OPTIONS)
    assert path.read_text() == '{"question": "?"}\n'
    with pytest.raises(Refused, match=r"must end in \.jsonl"):
        Journal(tmp_path / "a.json", OPTIONS)


def test_one_process_at_a_time(tmp_path):
    path = tmp_path / "a.jsonl"
    with Journal(path, OPTIONS):
        said = multiprocessing.get_context("spawn").Pool(1).apply(_try, (path,))
    assert "is being written by another process" in said
    assert _try(path) == "opened"  # it is free again


def _try(path):
    try:
        Journal(path, OPTIONS).close()
    except Refused as refused:
        return str(refused)
    return "opened"
