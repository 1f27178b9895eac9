"""What counts as a hang, and what happens then. Not here: several ranks (tests/e2e/test_hang.py)."""

import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from megapsft.platform import hang
from megapsft.platform.hang import HUNG, HangWatch, Heartbeat

START = """
import sys, time
from pathlib import Path
from megapsft.platform.hang import HangWatch, Heartbeat
"""


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only where the test says so."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(hang, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def take(heart: Heartbeat, clock: SimpleNamespace, *steps: float) -> None:
    for seconds in steps:
        heart.begin()
        clock.seconds += seconds
        heart.end()


def test_the_limit_is_so_many_median_steps(clock):
    heart = Heartbeat(20.0, 60.0)
    assert heart.limit is None  # nothing to compare with
    take(heart, clock, 100.0, 4.0, 5.0)
    assert heart.limit == 100.0
    take(heart, clock, 1.0, 1.0, 1.0, 1.0)
    assert heart.limit == 60.0  # the floor
    heart.forget()
    assert heart.limit is None
    assert Heartbeat(None, 60.0).limit is None


def test_what_lies_between_steps_is_neither_watched_nor_counted(clock):
    heart = Heartbeat(20.0, 0.0)
    take(heart, clock, 1.0)
    assert heart.since == 1.0
    heart.rest()
    assert heart.since is None
    clock.seconds += 1000
    take(heart, clock, 1.0)
    assert heart.limit == 20.0
    heart.beat()
    assert heart.since == 1002.0


def test_a_hang_writes_the_stacks_of_all_threads_and_ends_the_process(tmp_path):
    script = """
import threading
heart = Heartbeat(1e-9, 0.5)
HangWatch(heart, Path(sys.argv[1]), rank=3)
heart.begin()
heart.end()
heart.begin()

def a_thread_that_waits():
    time.sleep(600)

threading.Thread(target=a_thread_that_waits, daemon=True).start()
a_thread_that_waits()
"""
    done = subprocess.run([sys.executable, "-c", START + script, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == HUNG == 70
    (stacks,) = tmp_path.iterdir()
    assert stacks.name == "rank-3-0.txt"
    assert stacks.read_text().count("in a_thread_that_waits") == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("megapsft: rank 3: no update for ")
    assert str(stacks) in line


def test_one_that_goes_on_in_time_is_let_live(tmp_path, capsys):
    for number in range(2):
        heart, said = Heartbeat(1e-9, 0.1), ""
        heart.begin()
        heart.end()
        watch = HangWatch(heart, tmp_path, rank=0, grace=3600.0)
        deadline = time.monotonic() + 60
        while "it goes on after all" not in said:
            assert time.monotonic() < deadline, said
            said += capsys.readouterr().err
            if "stacks: " in said:
                heart.beat()
            time.sleep(0.01)
        watch.close()
        assert str(tmp_path / f"rank-0-{number}.txt") in said  # none is written over


def test_a_process_that_stood_still_says_so_and_goes_on(tmp_path):
    script = """
import threading
HangWatch(heart := Heartbeat(1e-9, 1.5), Path(sys.argv[1]), rank=0)
heart.begin()
heart.end()
heart.begin()

def go_on():
    while True:
        heart.beat()
        time.sleep(0.01)

threading.Thread(target=go_on, daemon=True).start()
print("up", flush=True)
input()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", START + script, tmp_path], **pipes)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    assert " did not run for " in process.stderr.readline()
    process.communicate("\n", timeout=60)
    assert process.returncode == 0
    assert "in go_on" in (tmp_path / "rank-0-0.txt").read_text()
