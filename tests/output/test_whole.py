"""Files appear whole or not at all; pipes are written to, and links stay links."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading

import pytest

from megapsft.output.places import check_file
from megapsft.output.whole import whole, write_whole

PLAN = ["plan", "configs/psft/qwen3-30b-a3b.yaml", "--nodes", "4", "--json"]


def test_a_file_is_the_new_one_only_when_all_is_written(tmp_path):
    file = tmp_path / "new/folder/file"
    with whole(file) as place:
        place.write_text("half ")
        assert not file.exists()
        place.write_text("whole")
    assert file.read_text() == "whole"
    write_whole(file, "ψ\n")
    assert file.read_bytes() == "ψ\n".encode()
    assert [path.name for path in file.parent.iterdir()] == ["file"]


def test_what_raises_meanwhile_leaves_the_old_file_and_nothing_else(tmp_path):
    write_whole(tmp_path / "file", "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "file", "new, but \ud800")
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_link_stays_and_what_it_names_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there/file")
    check_file("--out", tmp_path / "link")
    for text in ("new", "again"):
        write_whole(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "there/file").read_text() == text


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    check_file("--out", tmp_path / "pipe")
    write_whole(tmp_path / "pipe", "all of it")
    reader.join(60)
    assert read == ["all of it"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_command_writes_into_a_descriptor_as_a_shell_names_it():
    """`megapsft plan ... --json >(jq ...)` is a path such as /dev/fd/63."""
    reads, writes = os.pipe()
    with os.fdopen(reads) as pipe:
        command = [sys.executable, "-m", "megapsft.cli", *PLAN, f"/dev/fd/{writes}"]
        done = subprocess.run(command, pass_fds=[writes], capture_output=True, text=True)
        os.close(writes)
        assert done.returncode == 0, done.stderr
        assert json.load(pipe)["nodes"] == 4
