"""Servers that are started here: with ports of their own, or with the reason, and never left behind.

Killed and hung in the middle of a run: test_training.py.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from megapsft.errors import Refused
from megapsft.rollout.sglang.server import free_port
from tests.rollout.sglang.servers import engine_of

pytestmark = pytest.mark.servers


def wait_for(true, seconds=240):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_port_in_use(dense, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = pytest.raises(Refused, match=rf"rollout.port={port}: cannot be listened on.*use rollout.port=0")
        with refused, engine_of([], dense, tmp_path, port=port):
            pass


def test_servers_that_start_at_once_have_ports_of_their_own():
    """A port that was free a moment ago may be another server's by now, or a connection's."""
    with ThreadPoolExecutor(16) as threads:
        ports = list(threads.map(lambda _: free_port(), range(500)))
    assert len(set(ports)) == 500
    first, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert max(ports) < first


def test_one_that_cannot_start_says_why_in_its_own_words(dense, tmp_path):
    refused = pytest.raises(Refused, match=r"(?s)exit code 2; the last lines of .*unrecognized arguments: --no-such-option")
    with refused, engine_of([], dense, tmp_path, server_args=("--no-such-option",)):
        pass
    refused = pytest.raises(Refused, match=r"was not healthy within rollout.startup_timeout=0.5 seconds")
    with refused, engine_of([], dense, tmp_path, startup_timeout=0.5):
        pass


def test_it_dies_with_the_process_that_started_it(dense, tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from tests.rollout.sglang.servers import start\n"
        "print(start(Path(sys.argv[1]), Path(sys.argv[2])).pid, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", program, str(dense), str(tmp_path / "log")]
    root = Path(__file__).resolve().parents[3]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as parent:
        pid = int(parent.stdout.readline())
        server = psutil.Process(pid)
        wait_for(lambda: len(server.children()) >= 2)  # which begin to run the model for seconds yet
        time.sleep(0.5)  # they have asked by then to be ended
        everything = [server, *server.children()]
        os.kill(parent.pid, signal.SIGKILL)
    wait_for(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in everything), 20)
