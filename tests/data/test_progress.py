"""Who waits for a large file sees how far it is: a bar on a terminal, lines in a log, from the first rank alone."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from megapsft.config import ColumnsConfig, DataConfig
from megapsft.data import progress
from megapsft.data.chat_template import ChatTemplate
from megapsft.data.demonstrations import load_demonstrations
from megapsft.data.progress import watched
from megapsft.data.rows import read_rows

ON_A_TERMINAL = """
from megapsft.data import progress
progress.QUIET = progress.REFRESH = 0
with progress.watched(range(5), "data.jsonl: tokenised", 5) as rows:
    for row in rows:
        if row == 3:
            raise SystemExit("row 3 is refused")
"""


def test_rows_are_what_they_were_and_small_files_say_nothing(capsys):
    with watched(iter("abc"), "data.jsonl: read") as rows:
        assert list(rows) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("total", "of"), [(None, ""), (2000, " of 2,000")])
def test_lines_where_stderr_is_a_log(total, of, monkeypatch, capsys):
    monkeypatch.setattr(progress, "BETWEEN", 0)
    with watched(range(1001), "data.jsonl: tokenised", total) as rows:
        assert sum(rows) == 500_500
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"data.jsonl: tokenised 1{of} rows"
    assert lines[1000] == f"data.jsonl: tokenised 1,001{of} rows"


def test_other_ranks_say_nothing(monkeypatch, capsys):
    monkeypatch.setattr(progress, "BETWEEN", 0)
    monkeypatch.setenv("RANK", "3")
    with watched(range(5), "data.jsonl: tokenised", 5) as rows:
        assert list(rows) == [0, 1, 2, 3, 4]
    assert capsys.readouterr() == ("", "")


def test_a_training_set_is_watched_while_it_is_read_and_while_it_is_tokenised(tiny_models, tiny_data, monkeypatch, capsys):
    monkeypatch.setattr(progress, "BETWEEN", 0)
    columns = ColumnsConfig(prompt="question", demonstration="answer")
    count = len(read_rows(tiny_data, columns))
    assert capsys.readouterr().err.splitlines()[-1] == f"{tiny_data}: read {count:,} rows"
    config = DataConfig(path=str(tiny_data), columns=columns, max_length=512)
    load_demonstrations(config, ChatTemplate.load(tiny_models("qwen3")), 10**6)
    assert capsys.readouterr().err.splitlines()[-1] == f"{tiny_data}: tokenised {count:,} of {count:,} rows"


def test_a_bar_on_a_terminal_which_is_gone_before_anything_else_is_said():
    terminal, stderr = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run([sys.executable, "-c", ON_A_TERMINAL], stderr=stderr, env=environment)
    os.close(stderr)
    said = b""
    while True:
        try:
            said += os.read(terminal, 4096)
        except OSError:  # all is read, and nobody writes any more
            break
    os.close(terminal)
    assert done.returncode == 1
    shown, _, after = said.decode().rpartition("\x1b[?25h")  # the cursor, which a bar hides
    assert "data.jsonl: tokenised" in shown
    assert "3/5" in shown
    assert after.endswith("row 3 is refused\r\n")
    assert "tokenised" not in after
