"""Servers that are started here: killed, stopped, started again with the current weights, and never left behind."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from megapsft.errors import Refused
from megapsft.rollout.base import Sampling
from megapsft.rollout.sglang.server import free_port
from tests.rollout.sglang.servers import answered_once, engine_of, requests, weights

pytestmark = pytest.mark.servers


def scheduler_of(pid):
    children = psutil.Process(pid).children(recursive=True)
    return next(child for child in children if "sched" in child.name() + child.cmdline()[0])


def wait_for(true, seconds=240):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_killed_and_hung_while_it_generates_and_nothing_is_left(dense, tmp_path):
    """Of two servers one is killed, and while it starts again the other one hangs; both come back with the current weights."""
    asked, sampling = requests(10), Sampling(max_tokens=700)
    with engine_of([], dense, tmp_path, servers=2) as engine:
        engine.load_weights(weights(dense, 1.1).items(), 1)
        first, second = engine.servers
        everything = [psutil.Process(member.process.pid) for member in engine.servers]
        everything += [child for process in everything for child in process.children(recursive=True)]
        for process in everything:
            for open_port in process.net_connections("tcp"):
                assert open_port.status != psutil.CONN_LISTEN or open_port.laddr.ip == "127.0.0.1"

        for member, fault in ((first, lambda m: scheduler_of(m.process.pid).kill()), (second, stop)):
            found = []
            thread = threading.Thread(target=lambda found=found: found.extend(engine.generate(asked, sampling)))
            thread.start()
            wait_for(lambda member=member: member.running)
            time.sleep(0.3)
            fault(member)
            thread.join()
            assert answered_once(asked, found)
            assert {(len(rollout.response_ids), rollout.weight_version) for rollout in found} == {(700, 1)}
        for member in engine.servers:
            wait_for(lambda member=member: member.state == "ready" and member.outs == 1)
            everything += [psutil.Process(member.process.pid), *psutil.Process(member.process.pid).children(recursive=True)]
            assert member.client.about(10).weight_version == "1"
            engine._pool._check(member, engine._pool._expected)  # its weights are those of the update, not of the folder
    wait_for(lambda: not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in everything), 20)


def test_one_that_starts_without_weights_has_those_of_the_update_when_it_starts_again(dense, tmp_path):
    """As with FP8, whose servers start from a folder that has no weights; here they are fp32."""
    empty = tmp_path / "empty"
    shutil.copytree(dense, empty, ignore=shutil.ignore_patterns("*.safetensors"))
    with engine_of([], empty, tmp_path, server_args=("--load-format", "dummy")) as engine:
        engine.load_weights(weights(dense, 1.1).items(), 1)
        (server,) = engine.servers
        scheduler_of(server.process.pid).kill()
        wait_for(lambda: server.state == "ready" and server.outs == 1)
        assert server.client.about(10).weight_version == "1"
        engine._pool._check(server, engine._pool._expected)


def stop(member):
    for process in (psutil.Process(member.process.pid), scheduler_of(member.process.pid)):
        process.suspend()


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
        wait_for(lambda: len(server.children()) >= 3)  # of them two are SGLang's, which import for seconds yet
        time.sleep(0.5)  # they have asked by then to be ended
        everything = [server, *server.children()]
        os.kill(parent.pid, signal.SIGKILL)
    wait_for(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in everything), 20)
