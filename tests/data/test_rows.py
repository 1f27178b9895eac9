"""Not tested here: network file systems, compressed JSONL."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megapsft.config import ColumnsConfig
from megapsft.data.rows import Row, read_records, read_rows
from megapsft.errors import Refused

COLUMNS = ColumnsConfig()
GOOD = {"prompt": "What is 2 + 3?", "demonstration": "5"}


@pytest.fixture
def jsonl(tmp_path):
    def write(*records, tail=""):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
        return path

    return write


@pytest.fixture
def parquet(tmp_path):
    def write(**columns):
        path = tmp_path / "rows.parquet"
        pq.write_table(pa.table(columns), path)
        return path

    return write


def test_jsonl_rows_keep_their_order_and_lines(jsonl):
    path = jsonl(GOOD, {"prompt": "q", "demonstration": "a", "other": 1}, tail="\n  \n")
    assert read_rows(path, COLUMNS) == [Row("What is 2 + 3?", "5", f"{path}:1"), Row("q", "a", f"{path}:2")]


def test_columns_can_have_other_names(jsonl):
    path = jsonl({"question": "q", "answer": "a"})
    assert read_rows(path, ColumnsConfig(prompt="question", demonstration="answer")) == [Row("q", "a", f"{path}:1")]


def test_chat_messages_are_a_prompt(jsonl):
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "q"}]
    assert read_rows(jsonl({"prompt": messages, "demonstration": "a"}), COLUMNS)[0].prompt == messages


def test_limit_takes_the_first_rows_and_does_not_look_further(jsonl):
    assert len(read_rows(jsonl(GOOD, GOOD, tail="{broken"), COLUMNS, limit=2)) == 2


def test_parquet_gives_the_same_rows_as_jsonl(jsonl, parquet):
    messages = [{"role": "user", "content": "q"}]
    from_jsonl = read_rows(jsonl({"prompt": messages, "demonstration": "a"}, {"prompt": messages, "demonstration": "b"}), COLUMNS)
    path = parquet(extra=[1, 2], prompt=[messages, messages], demonstration=["a", "b"])
    from_parquet = read_rows(path, COLUMNS)
    assert [(row.prompt, row.demonstration) for row in from_parquet] == [(row.prompt, row.demonstration) for row in from_jsonl]
    assert [row.source for row in from_parquet] == [f"{path}:1", f"{path}:2"]


def test_parquet_limit_and_many_batches(parquet):
    path = parquet(prompt=["q"] * 3000, demonstration=[f"a{i}" for i in range(3000)])
    rows = read_rows(path, COLUMNS)
    assert [row.demonstration for row in rows] == [f"a{i}" for i in range(3000)]
    assert rows[-1].source == f"{path}:3000"
    assert read_rows(path, COLUMNS, limit=1500) == rows[:1500]


def test_parquet_reads_the_named_columns_and_no_others(parquet):
    path = parquet(prompt=["q"], extra=[1], chosen=["a"], rejected=["b"])
    ((source, record),) = read_records(path, COLUMNS, ("prompt", "chosen"), ("rejected", "demonstration"))
    assert (source, record) == (f"{path}:1", {"prompt": "q", "chosen": "a", "rejected": "b"})


def test_an_optional_column_under_another_name_must_be_in_some_row(jsonl):
    columns, with_one, without = ColumnsConfig(demonstration="d"), {"prompt": "q", "d": "a"}, {"prompt": "q", "x": 1}
    assert len(read_records(jsonl(without, with_one), columns, ("prompt",), ("demonstration",))) == 2
    with pytest.raises(Refused, match="data.columns.demonstration=d: is a column of no row; there are: prompt, x"):
        read_records(jsonl(without, without), columns, ("prompt",), ("demonstration",))


def test_null_fields_that_parquet_adds_to_messages_are_gone(parquet):
    messages = [{"role": "user", "content": "q", "name": None}, {"role": "user", "content": "q", "name": "n"}]
    rows = read_rows(parquet(prompt=[messages], demonstration=["a"]), COLUMNS)
    assert rows[0].prompt == [{"role": "user", "content": "q"}, {"role": "user", "content": "q", "name": "n"}]


@pytest.mark.parametrize(
    ("record", "rule"),
    [
        ([1], "is a JSON list, not an object"),
        ({"question": "q", "answer": "a"}, "the row has: question, answer"),
        ({"prompt": "q", "demostration": "a"}, "is misspelt 'demostration'"),
        ({"prompt": 3, "demonstration": "a"}, "is a int"),
        ({"prompt": "q", "demonstration": ["a"]}, "is a list"),
        ({"prompt": "q", "demonstration": None}, "is a NoneType"),
        ({"prompt": "q", "demonstration": ""}, "is empty or blank"),
        ({"prompt": "q", "demonstration": " \n"}, "is empty or blank"),
        ({"prompt": " ", "demonstration": "a"}, "is empty or blank"),
        ({"prompt": "q", "demonstration": "\ud800"}, "half a surrogate pair"),
        ({"prompt": [], "demonstration": "a"}, "is an empty list"),
        ({"prompt": ["q"], "demonstration": "a"}, "is a str"),
        ({"prompt": [{"role": "human", "content": "q"}], "demonstration": "a"}, "has role 'human'"),
        ({"prompt": [{"role": ["user"], "content": "q"}], "demonstration": "a"}, "has role"),
        ({"prompt": [{"content": "q"}], "demonstration": "a"}, "has role None"),
        ({"prompt": [{"role": "user", "content": [{"text": "q"}]}], "demonstration": "a"}, "has content of type list"),
        ({"prompt": [{"role": "user"}], "demonstration": "a"}, "has content of type NoneType"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "image"}]}], "demonstration": "a"},
            "holds a part of type 'image', and text alone is trained",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"text": None, "video": "a.mp4"}]}], "demonstration": "a"},
            "holds a part of type 'video', and text alone is trained",
        ),
        ({"prompt": [{"role": "user", "content": " "}], "demonstration": "a"}, "is empty or blank"),
        ({"prompt": [{"role": "assistant", "content": "q"}], "demonstration": "a"}, "ends with an assistant turn"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(jsonl, record, rule):
    path = jsonl(GOOD, record)
    with pytest.raises(Refused) as refusal:
        read_rows(path, COLUMNS)
    assert rule in refusal.value.rule
    assert refusal.value.value.startswith(f"{path}:2")


def test_a_missing_column_comes_with_the_key_to_set(jsonl):
    with pytest.raises(Refused) as refusal:
        read_rows(jsonl({"question": "q", "demonstration": "a"}), COLUMNS)
    assert "data.columns.prompt=NAME" in refusal.value.remedy


@pytest.mark.parametrize("line", [b"{broken\n", b"\xff\xfe\n"])
def test_a_line_that_is_not_json_is_refused(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line)
    with pytest.raises(Refused, match="rows.jsonl:2: is not a line of JSON"):
        read_rows(path, COLUMNS)


def test_a_blank_line_between_rows_is_refused(jsonl):
    with pytest.raises(Refused, match="rows.jsonl:2: is a blank line"):
        read_rows(jsonl(GOOD, tail="\n" + json.dumps(GOOD) + "\n"), COLUMNS)


@pytest.mark.parametrize("tail", ["", "\n\n"])
def test_an_empty_file_is_refused(jsonl, tail):
    with pytest.raises(Refused, match="holds no rows"):
        read_rows(jsonl(tail=tail), COLUMNS)


def test_empty_parquet_is_refused(parquet):
    with pytest.raises(Refused, match="holds no rows"):
        read_rows(parquet(prompt=pa.array([], pa.string()), demonstration=pa.array([], pa.string())), COLUMNS)


def test_a_bad_parquet_row_is_refused_with_its_number(parquet):
    with pytest.raises(Refused, match=r"rows.parquet:2: column 'demonstration': is a NoneType"):
        read_rows(parquet(prompt=["q", "q"], demonstration=["a", None]), COLUMNS)


def test_a_missing_parquet_column_is_refused(parquet):
    with pytest.raises(Refused, match="the row has: question, demonstration"):
        read_rows(parquet(question=["q"], demonstration=["a"]), COLUMNS)


def test_a_file_that_is_only_named_parquet_is_refused(tmp_path):
    (tmp_path / "rows.parquet").write_text("no")
    with pytest.raises(Refused, match="is not a readable Parquet file"):
        read_rows(tmp_path / "rows.parquet", COLUMNS)


@pytest.mark.parametrize(("name", "rule"), [("rows.csv", "must end in"), ("none.csv", "is not a file"), ("", "is not a file")])
def test_a_path_that_is_no_data_file_is_refused(tmp_path, name, rule):
    (tmp_path / "rows.csv").write_text("a,b\n")
    with pytest.raises(Refused, match=rule):
        read_rows(tmp_path / name if name else "", COLUMNS)
