"""`megapsft evaluate` through a real server, killed: what was answered is not asked for again. In process: tests/evaluate."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from megapsft.data.arithmetic import generate, write_jsonl
from tests.command import ROOT, megapsft
from tests.rollout.sglang.servers import Proxy

pytestmark = pytest.mark.servers

PROBLEMS, N = 10, 4
AT_ONCE = 20  # responses that come before it is killed: the others wait for that


def test_killed_and_started_again_no_server_is_asked_twice(two_urls, dense, tmp_path):
    problems, out = tmp_path / "mine.jsonl", tmp_path / "out"
    write_jsonl(problems, generate(PROBLEMS, 3))
    killed = threading.Event()

    def hold(path: str, count: int, body: dict) -> None:
        if path == "/generate" and count >= AT_ONCE:
            killed.wait(300)  # not for ever: where the test fails before that, what it started has to end

    proxy = Proxy(two_urls[0], hold)
    with proxy.listening() as url:
        command = ["evaluate", "--model", str(dense), "--data", str(problems), "--n", str(N), "--max-tokens", "16", "--k", "1,4",
                   "--engine", "sglang", "--url", url, "--out", str(out)]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with subprocess.Popen([sys.executable, "-m", "megapsft.cli", *command], cwd=ROOT, env=environment) as process:
            deadline = time.monotonic() + 240
            while not (out / "mine.jsonl").is_file() or (out / "mine.jsonl").read_bytes().count(b"\n") < 5:
                assert process.poll() is None, "it ended before it could be killed"
                assert time.monotonic() < deadline, "took too long"
                time.sleep(0.01)
            process.kill()
        killed.set()
        before = answered(out)
        assert 5 <= len(before) <= AT_ONCE
        await_silence(proxy)  # what was under way when it was killed still arrives
        proxy.calls.clear()
        again = megapsft(*command)
    assert again.returncode == 0, again.stderr
    assert proxy.calls["/generate"] == PROBLEMS * N - len(before)
    assert f"{len(before)} of them by an earlier attempt" in again.stdout
    after = answered(out)
    assert len(after) == len(set(after)) == PROBLEMS * N
    assert after[: len(before)] == before
    found = json.loads((out / "results.json").read_text())["benchmarks"]["mine"]
    assert [len(scores) for scores in found["scores"]] == [N] * PROBLEMS


def await_silence(proxy: Proxy, seconds: float = 2.0) -> None:
    """Until nobody has asked for so long."""
    count, since = -1, time.monotonic()
    while time.monotonic() - since < seconds:
        if proxy.calls["/generate"] != count:
            count, since = proxy.calls["/generate"], time.monotonic()
        time.sleep(0.05)


def answered(out) -> list[tuple[int, int]]:
    """(problem, number of the response) of every whole line."""
    text = (out / "mine.jsonl").read_bytes()
    records = map(json.loads, text[: text.rfind(b"\n") + 1].splitlines())
    return [(record["row"], record["number"]) for record in records]
