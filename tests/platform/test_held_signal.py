"""A signal that waits to be looked for: neither the process nor those that it starts end of it."""

import subprocess
import sys

START = """
import os, signal, subprocess, sys, threading, time
from megapsft.platform.held_signal import HeldSignal

signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})  # a mask is inherited: `megapsft train` in these tests has set it
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", START + script], capture_output=True, text=True, timeout=60)


def test_it_waits_and_is_seen():
    script = """
held = HeldSignal(signal.SIGUSR1)
assert not held.came()
os.kill(os.getpid(), signal.SIGUSR1)
assert held.came()
assert held.came()
"""
    assert run(script).returncode == 0


def test_a_process_that_is_started_later_lives_on():
    script = """
HeldSignal(signal.SIGUSR1)
child = subprocess.Popen([sys.executable, "-c", "print('up', flush=True); input(); print('lives', flush=True)"],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
assert child.stdout.readline() == "up\\n"
os.kill(child.pid, signal.SIGUSR1)
print(child.communicate("\\n")[0], end="")
sys.exit(child.returncode)
"""
    done = run(script)
    assert (done.returncode, done.stdout) == (0, "lives\n")


def test_a_thread_that_is_started_later_does_not_let_it_through():
    script = """
held = HeldSignal(signal.SIGUSR1)
threading.Thread(target=threading.Event().wait, daemon=True).start()
os.kill(os.getpid(), signal.SIGUSR1)
assert held.came()
"""
    assert run(script).returncode == 0


def test_a_thread_that_was_there_before_lets_it_through_and_it_is_noted():
    script = """
threading.Thread(target=threading.Event().wait, daemon=True).start()
held = HeldSignal(signal.SIGUSR1)
os.kill(os.getpid(), signal.SIGUSR1)
while signal.sigpending() or not held.came():  # that thread takes it, and notes it, on its own time
    time.sleep(0.01)
"""
    assert run(script).returncode == 0


def test_a_process_that_waits_for_others_is_told():
    script = """
come = threading.Event()
held = HeldSignal(signal.SIGUSR1)
with held.passed_on(come.set):
    os.kill(os.getpid(), signal.SIGUSR1)
    assert come.wait(30)
come.clear()
with held.passed_on(come.set):
    pass  # over before anybody looked
assert not come.is_set()
"""
    done = run(script)
    assert done.returncode == 0, done.stderr
