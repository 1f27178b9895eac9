"""Places for results are looked at before anything runs: a folder for a file, a file for a folder, a place that is not ours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megapsft import cli
from megapsft.errors import Refused
from megapsft.output.places import check_file, check_folder

CONFIG = "configs/psft/tiny-qwen3-gsm8k.yaml"
OF_FILES = {
    "probe --out": ["probe", CONFIG, "--out"],
    "probe --plot": ["probe", CONFIG, "--plot"],
    "compare --out": ["compare", "--base", "a", "--tuned", "b", "--data", "c.jsonl", "--out"],
    "compare --json": ["compare", "--base", "a", "--tuned", "b", "--data", "c.jsonl", "--json"],
    "audit --html": ["audit", CONFIG, "--html"],
    "audit --json": ["audit", CONFIG, "--json"],
    "report --out": ["report", "run", "--out"],
    "curves --out": ["curves", "run", "--out"],
    "plan --json": ["plan", CONFIG, "--json"],
    "make-data --out": ["make-data", "--out"],
    "rollout --out": ["rollout", "--model", "a", "--data", "b.jsonl", "--out"],
}


def test_new_files_and_folders_may_be_written(tmp_path):
    (tmp_path / "old").write_text("")
    check_file("--out", None)
    check_file("--out", tmp_path / "old")
    check_file("--out", tmp_path / "some/new/folder/file")
    check_folder("run.dir", tmp_path)
    check_folder("run.dir", tmp_path / "some/new")


def test_what_cannot_be_written_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(Refused, match=f"--out {tmp_path}: is a folder; name a file in it"):
        check_file("--out", tmp_path)
    with pytest.raises(Refused, match=f"--out {file}/x: lies under {file}, a file; name another place"):
        check_file("--out", file / "x")
    with pytest.raises(Refused, match="run.dir=r: is a file"):
        check_folder("run.dir=r", file)
    with pytest.raises(Refused, match=f"run.dir=r: lies under {file}, a file"):
        check_folder("run.dir=r", file / "a/b")


@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_a_place_of_somebody_else_is_refused(mode, tmp_path):
    """As a user who is not root, in a process of its own: closed to writing, or to looking as well."""
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(mode)
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        said = b"was not refused"
        try:
            os.chdir(tmp_path)  # folders above it may be closed to others, too
            if os.getuid() == 0:
                os.setuid(65534)
            check_file("--out", Path("closed/new/file"))
        except BaseException as error:
            said = repr(error).encode()
        os.write(writes, said)
        os._exit(0)
    os.waitpid(child, 0)
    said = os.read(reads, 4096).decode()
    closed.chmod(0o700)
    assert "Refused('--out closed/new/file: cannot be written: " in said
    assert "is not yours to write to; name a place where you may write" in said


@pytest.mark.parametrize("command", OF_FILES)
def test_commands_look_before_they_work(command, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    option = command.split()[1]
    assert cli.main([*OF_FILES[command], str(tmp_path)]) == 2
    assert f"megapsft: {option} {tmp_path}: is a folder; name a file in it" in capsys.readouterr().err
    assert cli.main([*OF_FILES[command], str(tmp_path / "file/x")]) == 2
    assert f"megapsft: {option} {tmp_path}/file/x: lies under {tmp_path}/file, a file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_run_looks_at_its_folder(more, tiny_models, tiny_data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    run = tmp_path / "file/run"
    paths = [f"model.path={tiny_models('qwen3')}", f"data.path={tiny_data}", f"run.dir={run}"]
    assert cli.main(["train", CONFIG, *paths, *more]) == 2
    assert f"megapsft: run.dir={run}: lies under {tmp_path}/file, a file; name another place" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["pipeline configs/pipelines/psft-grpo.yaml", f"submit {CONFIG}"])
def test_pipelines_and_jobs_look_at_theirs(command, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main([*command.split(), f"run.dir={tmp_path}/file/run", "--dry-run"]) == 2
    assert f"run.dir={tmp_path}/file/run: lies under {tmp_path}/file, a file" in capsys.readouterr().err


def test_a_model_and_evaluations_are_not_made_under_a_file(tiny_data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file/x"
    assert cli.main(["init-model", "--family", "qwen3", "--data", str(tiny_data), "--out", str(out)]) == 2
    assert f"--out {out}: lies under {tmp_path}/file, a file" in capsys.readouterr().err
    assert cli.main(["evaluate", "--model", "a", "--data", "b.jsonl", "--out", str(out)]) == 2
    assert f"--out {out}: lies under {tmp_path}/file, a file" in capsys.readouterr().err
