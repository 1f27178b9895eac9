"""What a run writes down of the code that it is made with."""

import os
import shutil
import subprocess

from megapsft.train import start


def test_the_revision_is_read_without_a_lock_on_the_checkout(tmp_path, monkeypatch):
    """An optional lock is of an index that is written again because a file's time has changed."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    (tmp_path / "start.py").write_text("")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    os.utime(tmp_path / "start.py", (1, 1))
    index = (tmp_path / ".git/index").read_bytes()
    monkeypatch.setattr(start, "__file__", str(tmp_path / "start.py"))
    found = start.revision()
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert found.endswith(commit)  # not -dirty: nothing but a time has changed
    assert (tmp_path / ".git/index").read_bytes() == index
    (tmp_path / "start.py").write_text("1\n")
    assert start.revision().endswith(f"{commit}-dirty")
    shutil.rmtree(tmp_path / ".git")
    assert start.revision().startswith("megapsft ")


def test_installed_in_somebodys_checkout_the_revision_is_not_theirs(tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/start.py").write_text("")
    monkeypatch.setattr(start, "__file__", str(tmp_path / ".venv/start.py"))
    assert start.revision() == f"megapsft {start.__version__}"
