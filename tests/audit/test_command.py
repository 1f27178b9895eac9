"""`megapsft audit`, from its arguments to its exit code and files."""

import json

import pytest

from megapsft.cli import main
from megapsft.data.arithmetic import generate, write_jsonl


@pytest.fixture
def arguments(tiny_models, tmp_path):
    """The command for a file of these rows."""

    def make(rows, *more):
        write_jsonl(tmp_path / "rows.jsonl", rows)
        (tmp_path / "config.yaml").write_text(
            f"model: {{path: {tiny_models('qwen3')}}}\n"
            f"data: {{path: {tmp_path / 'rows.jsonl'}, columns: {{prompt: question, demonstration: answer}}}}\n"
            "train: {batch_size: 8}\nobjective: {name: sft}\n"
        )
        return ["audit", str(tmp_path / "config.yaml"), *map(str, more)]

    return make


def test_clean_rows_pass_where_it_is_strict(arguments, tmp_path, capsys):
    html, file = tmp_path / "out/audit.html", tmp_path / "out/audit.json"
    assert main(arguments(generate(40, 1), "--strict", "--rows", 2, "--html", html, "--json", file)) == 0
    said = capsys.readouterr().out
    assert "no warnings" in said
    assert said.count("demonstration: trained") == 2
    assert html.read_text().startswith("<!doctype html>")
    assert json.loads(file.read_text())["warnings"] == []


def test_a_fault_fails_where_it_is_strict_and_not_else(arguments, capsys):
    rows = generate(40, 1)
    rows[6] = rows[2]
    assert main(arguments(rows, "--strict")) == 1
    assert "row 7: as row 3" in capsys.readouterr().out
    assert main(arguments(rows)) == 0


def test_what_cannot_be_read_at_all_is_refused(arguments, capsys):
    assert main(arguments(generate(4, 1), "data.columns.prompt=problem")) == 2
    assert "column 'problem'" in capsys.readouterr().err
    assert main(arguments(generate(4, 1), "--rows", -1)) == 2
    assert "--rows -1" in capsys.readouterr().err


def test_problems_of_evaluations_are_looked_for(arguments, tmp_path):
    write_jsonl(tmp_path / "test.jsonl", [{"problem": row["question"], "answer": "1"} for row in generate(40, 1)[4:6]])
    write_jsonl(tmp_path / "other.jsonl", [{"prompt": row["question"], "answer": "1"} for row in generate(40, 1)[8:9]])
    file = tmp_path / "audit.json"
    more = ["--eval", tmp_path / "other.jsonl", "--json", file]
    assert main(arguments(generate(40, 1), f"evaluate.data=[{tmp_path}/test.jsonl]", *more)) == 0
    (warned,) = json.loads(file.read_text())["warnings"]
    assert (warned["rule"], warned["rows"]) == ("overlap", [5, 6, 9])
    assert "other.jsonl:1" in warned["found"][2]["what"]


def test_one_row_may_be_refused_and_the_others_are_still_looked_at(arguments, tmp_path):
    rows = generate(40, 1)
    rows[2]["answer"] = " "
    rows[6] = rows[3]
    file = tmp_path / "audit.json"
    assert main(arguments(rows, "--json", file)) == 0
    assert {warned["rule"]: warned["rows"] for warned in json.loads(file.read_text())["warnings"]} == {
        "refused": [3],
        "duplicate": [7],
    }
