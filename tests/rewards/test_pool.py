"""Workers that do not answer, end, or raise, and what becomes of the rest. Not here: mathematics."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from megapsft.errors import Refused
from megapsft.rewards._pool import Pool
from megapsft.rewards._process import Process

WORKERS = Path(__file__).with_name("workers.py")


def target(name):
    return f"{WORKERS}:{name}"


@pytest.fixture
def pool():
    made = Pool(2)
    yield made
    made.close()


def one(pool, text, seconds=20.0):
    """The outcome of misbehaving so, and whether the pool works as before afterwards."""
    (outcome,) = pool.map(target("misbehave"), [(text,)], seconds)
    assert [after.value for after in pool.map(target("misbehave"), [("well",)] * 4, 20.0)] == [1.0] * 4
    return outcome


@pytest.mark.parametrize("how", ["loop", "hold the interpreter", "ignore signals", "stop"])
def test_what_does_not_return_is_killed(pool, how):
    outcome = one(pool, how, 0.5)
    assert (outcome.value, outcome.failure, outcome.message) == (0.0, "timeout", "no answer within 0.5 s")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("crash", "its process ended, by SIGSEGV"),
        ("exit", "its process ended, with exit code 3"),
        ("memory", "its process ended, with exit code 77"),
    ],
)
def test_a_process_that_ends_is_replaced(pool, how, said):
    outcome = one(pool, how)
    assert (outcome.value, outcome.failure, outcome.message) == (0.0, "died", said)


def test_memory_is_bounded_in_each_worker(pool):
    frugal = Pool(1, memory_bytes=1 << 26)
    outcomes = frugal.map(target("allocate"), [(1 << 25,), (1 << 27,), (1 << 25,)], 20.0)
    assert [outcome.failure for outcome in outcomes] == [None, "died", None]
    assert pool.map(target("allocate"), [(1 << 27,)], 20.0)[0].value == 1 << 27
    frugal.close()


def test_a_child_that_is_left_behind_with_the_pipes_keeps_nobody_waiting(pool):
    assert one(pool, "leave a child that holds the pipes", 1.0).failure == "timeout"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raise", "RuntimeError: no such problem (workers.py, line "),
        ("leave", "SystemExit: 1"),
        ("nan", "ValueError: returned nan, which is not finite"),
        ("nothing", "TypeError: returned NoneType, not a number"),
        ("text", "TypeError: returned str, not a number"),
    ],
)
def test_what_raises_says_what(pool, how, said):
    outcome = one(pool, how)
    assert (outcome.value, outcome.failure) == (0.0, "error")
    assert said in outcome.message


def test_order_is_kept_and_calls_overlap():
    pool = Pool(4)
    assert [outcome.value for outcome in pool.map(target("sleep"), [(0.3,), (0.0,), (0.1,), (0.2,)], 20.0)] == [
        0.3,
        0.0,
        0.1,
        0.2,
    ]
    ids = {outcome.value for outcome in pool.map(target("process_id"), [("",)] * 40, 20.0)}
    assert 1 < len(ids) <= 4
    assert os.getpid() not in ids
    pool.close()


def test_the_late_cost_the_others_nothing(pool):
    calls = [("loop",) if i % 5 == 2 else ("well",) for i in range(15)]
    outcomes = pool.map(target("misbehave"), calls, 1.0)
    assert [outcome.failure for outcome in outcomes] == ["timeout" if i % 5 == 2 else None for i in range(15)]
    assert [outcome.value for outcome in outcomes] == [0.0 if i % 5 == 2 else 1.0 for i in range(15)]


def test_several_threads_may_ask_at_once(pool):
    found = {}

    def ask(number):
        found[number] = [outcome.value for outcome in pool.map(target("echo"), [("x" * number,)] * 5, 20.0)]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [float(number)] * 5 for number in range(6)}


@pytest.mark.parametrize(
    "text", ["", "\0", "\ud800", "\n\r\u2028", "é" * 3, "x" * 3_000_000], ids=lambda text: f"{len(text)}-{text[:1]!r}"
)
def test_any_text_arrives_whole_and_prints_disturb_nothing(pool, text):
    if "\ud800" in text:
        (outcome,) = pool.map("builtins:len", [(text,)], 20.0)
    else:
        (outcome,) = pool.map(target("echo"), [(text,)], 20.0)
    assert outcome.value == len(text)


def test_a_worker_that_ended_between_calls_costs_no_sample():
    pool = Pool(1)
    (before,) = pool.map(target("process_id"), [("",)], 20.0)
    os.kill(int(before.value), signal.SIGKILL)
    until_gone(int(before.value))
    (after,) = pool.map(target("process_id"), [("",)], 20.0)
    assert after.failure is None
    assert after.value != before.value
    pool.close()


def test_closing_lets_workers_end_by_themselves():
    process = Process(1 << 30)
    assert process.call(target("echo"), ["abc"], {}, 20.0).value == 3
    process.close()
    assert process._popen.returncode == 0


def test_nothing_runs_after_closing(pool):
    ids = {int(outcome.value) for outcome in pool.map(target("process_id"), [("",)] * 20, 20.0)}
    pool.close()
    pool.close()
    assert not any(alive(process) for process in ids)
    with pytest.raises(RuntimeError, match="closed|shutdown"):
        pool.map(target("process_id"), [("",)], 20.0)


def test_a_fork_of_this_process_that_ends_leaves_the_workers_alone():
    pool = Pool(1)
    (before,) = pool.map(target("process_id"), [("",)], 20.0)
    if (child := os.fork()) == 0:
        pool.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert pool.map(target("process_id"), [("",)], 20.0) == [before]
    pool.close()


def test_without_calls_there_are_no_processes(pool):
    assert pool.map(target("process_id"), [], 20.0) == []
    assert pool._processes == []


@pytest.mark.parametrize("ended", ["killed", "left open"])
def test_workers_end_with_their_parent_even_a_busy_one(ended, tmp_path):
    program = (
        "import sys, threading, time\n"
        "from megapsft.rewards._pool import Pool\n"
        "pool = Pool(2)\n"
        f"ids = {{int(found.value) for found in pool.map({target('process_id')!r}, [('',)] * 40, 60.0)}}\n"
        f"threading.Thread(target=pool.map, args=({target('misbehave')!r}, [('loop',)], 3.0)).start()\n"
        "time.sleep(0.5)\n"
        "print(*ids, flush=True)\n" + ("time.sleep(3600)\n" if ended == "killed" else "")
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        ids = [int(word) for word in parent.stdout.readline().split()]
        assert ids
        if ended == "killed":
            assert all(alive(process) for process in ids)
            parent.kill()
        parent.wait(60)
    for process in ids:
        until_gone(process)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (target("missing"), "has no attribute 'missing'"),
        ("nowhere.at.all:reward", "No module named 'nowhere'"),
        (f"{WORKERS.with_name('gone.py')}:reward", "gone.py"),
        (target("length"), "missing a required argument: 'response'"),
    ],
)
def test_what_cannot_be_called_is_refused(pool, where, said):
    with pytest.raises(Refused) as refused:
        pool.map(where, [("one",)], 20.0)
    assert said in str(refused.value)
    with pytest.raises(Refused):
        pool.check(where, 1, {})


def test_what_is_not_json_is_refused(pool):
    with pytest.raises(Refused, match="cannot be sent to a reward as JSON"):
        pool.map(target("echo"), [(b"bytes",)], 20.0)


def test_workers_import_no_torch(pool):
    assert [outcome.value for outcome in pool.map("megapsft.rewards._verify:equal", [("1/2", "0.5")], 60.0)] == [1.0]
    program = "import sys, megapsft.rewards._worker, megapsft.rewards._verify; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize("options", [{"workers": 0}, {"memory_bytes": 1000}])
def test_refuses_and_says_what_would_be_right(options):
    with pytest.raises(Refused, match="or more"):
        Pool(**options)


def alive(process):
    """Whether it runs; one that has ended and whose parent has not asked for it does not."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def until_gone(process):
    for _ in range(600):
        if not alive(process):
            return
        time.sleep(0.05)
    raise AssertionError(f"process {process} still runs")
