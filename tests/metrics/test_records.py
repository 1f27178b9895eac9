"""Files of records. Not here: a machine that loses power between write and disk."""

import json
import math

import pytest

from megapsft.errors import Refused
from megapsft.metrics.records import JSONLines, read_records


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "metrics.jsonl"


def updates(path):
    return [record["update"] for record in read_records(path)]


def test_what_is_written_is_read_at_once(path):
    lines = JSONLines(path)
    lines.write({"update": 1, "phase": "train", "train/loss": 0.5})
    assert read_records(path) == [{"update": 1, "phase": "train", "train/loss": 0.5}]


def test_appends_to_what_is_there(path):
    for update in (1, 2):
        lines = JSONLines(path)
        lines.write({"update": update})
        lines.close()
    assert updates(path) == [1, 2]


def test_numbers_that_are_not_finite_are_null(path):
    lines = JSONLines(path)
    lines.write({"update": 1, "train/loss": math.nan, "train/grad_norm": math.inf})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "update": 1,
        "train/loss": None,
        "train/grad_norm": None,
    }


def test_truncate_forgets_later_updates_and_goes_on(path):
    lines = JSONLines(path)
    for update in range(1, 6):
        lines.write({"update": update})
    lines.truncate(3)
    lines.write({"update": 4, "again": True})
    assert updates(path) == [1, 2, 3, 4]
    assert read_records(path)[-1]["again"]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


def test_truncate_before_the_first_update(path):
    lines = JSONLines(path)
    lines.write({"update": 1})
    lines.truncate(0)
    assert updates(path) == []


def test_a_torn_last_line_does_not_count(path):
    JSONLines(path).write({"update": 1})
    with path.open("a") as file:
        file.write('{"update": 2, "train/lo')
    assert updates(path) == [1]

    resumed = JSONLines(path)
    resumed.truncate(2)
    resumed.write({"update": 2})
    assert updates(path) == [1, 2]


def test_a_torn_line_is_not_glued_to_the_next(path):
    JSONLines(path).write({"update": 1})
    with path.open("a") as file:
        file.write('{"upd')
    JSONLines(path).write({"update": 2})
    assert updates(path) == [1, 2]


def test_a_line_that_is_no_record_is_refused_by_its_number(path):
    JSONLines(path).write({"update": 1})
    with path.open("a") as file:
        file.write("3\n")
    with pytest.raises(Refused, match=r"metrics\.jsonl:2"):
        read_records(path)


def test_a_missing_file_is_refused(path):
    with pytest.raises(Refused, match="is not a file"):
        read_records(path)
