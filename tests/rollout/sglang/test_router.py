"""SGLang's own router in front of real servers: they are found through it, get the weights, and answer."""

import json
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from megapsft.errors import Refused
from megapsft.rollout.base import Sampling
from megapsft.rollout.sglang.router import servers_behind
from megapsft.rollout.sglang.server import find_python, free_port
from tests.rollout.sglang.servers import answered_once, engine_of, requests, weights

pytestmark = pytest.mark.servers


def workers(url: str) -> list:
    try:
        return httpx.get(f"{url}/workers", timeout=5, trust_env=False).json()["workers"]
    except httpx.HTTPError:
        return []


@pytest.fixture
def router(two_urls, tmp_path):
    port, metrics = free_port(), free_port()
    command = [str(find_python(None)), "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics), "--worker-urls", *two_urls]
    with (tmp_path / "router.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + 120
            while len(workers(f"http://127.0.0.1:{port}")) < len(two_urls):
                assert process.poll() is None, (tmp_path / "router.log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "router.log").read_text()
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def test_its_servers_are_asked_themselves(router, two_urls, dense, tmp_path):
    asked = requests(6)
    with engine_of([router, two_urls[0]], dense, tmp_path) as engine:
        assert {member.url for member in engine.servers} == set(two_urls)
        assert len(engine.servers) == 2  # the one that is named beside its router counts once
        engine.load_weights(weights(dense, 1.1).items(), 7)
        assert engine.last_update.servers == 2
        rollouts = engine.generate(asked, Sampling(max_tokens=4))
    assert answered_once(asked, rollouts)
    assert {rollout.weight_version for rollout in rollouts} == {7}


def test_a_server_is_itself(two_urls):
    assert [found for url in two_urls for found in servers_behind(url)] == two_urls


@pytest.mark.parametrize(
    ("said", "refusal"),
    [
        ([], "is a router without workers"),
        ([{"url": "http://127.0.0.1:1", "worker_type": "prefill", "connection_mode": "HTTP"}], "is prefill over http"),
        ([{"url": "grpc://127.0.0.1:1", "worker_type": "regular", "connection_mode": "GRPC"}], "is regular over grpc"),
    ],
)
def test_what_cannot_serve_rollouts_is_refused(said, refusal):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            content = json.dumps({"workers": said}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            """Not to the output of tests."""

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    try:
        with pytest.raises(Refused, match=refusal):
            servers_behind(f"http://127.0.0.1:{listener.server_address[1]}")
    finally:
        listener.shutdown()
        listener.server_close()
