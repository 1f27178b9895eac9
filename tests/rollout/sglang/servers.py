"""Real servers for tests, and a proxy of ours before one, which does to requests what networks and broken servers do."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import torch
from safetensors.torch import load_file

from megapsft.config import RolloutConfig
from megapsft.rollout.base import Request
from megapsft.rollout.sglang import SGLang
from megapsft.rollout.sglang.client import Client
from megapsft.rollout.sglang.server import Server, find_python

START_SECONDS = 240


def start(model: Path, log: Path) -> Server:
    """Started, not yet healthy."""
    server = Server(python=find_python(None), model=model, dtype="float32", tp_size=1, port=0, arguments=(), log=log)
    server.start()
    return server


def await_health(server: Server) -> None:
    client, deadline = Client(server.url), time.monotonic() + START_SECONDS
    while client.health(5) is not None:
        assert server.ended() is None, server.last_lines()
        assert time.monotonic() < deadline, server.last_lines()
        time.sleep(0.2)


@contextmanager
def engine_of(urls: list[str], model: Path, work: Path, **config) -> Iterator[SGLang]:
    """An engine over servers that run already, quick to notice what is wrong with them."""
    defaults = {"health_interval": 1.0, "request_timeout": 30.0, "bucket_bytes": 2**18, "urls": tuple(urls)}
    with closing(SGLang(RolloutConfig(engine="sglang", **(defaults | config)), model, work=work, dtype="float32")) as engine:
        yield engine


def weights(model: Path, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Those of the folder, every one of them a bit different."""
    return {name: tensor * scale for name, tensor in load_file(model / "model.safetensors").items()}


def requests(count: int, length: int = 4) -> list[Request]:
    """Each with a prompt of its own, so that a rollout says which request it is of."""
    return [Request(prompt_ids=(10 + number, *range(20, 20 + length - 1))) for number in range(count)]


def answered_once(asked: list[Request], rollouts: list) -> bool:
    """Each request has its rollout, in its place, and nothing is left over."""
    return [request.prompt_ids for request in asked] == [rollout.prompt_ids for rollout in rollouts]


@dataclasses.dataclass
class Proxy:
    """`fault(path, number of calls to it before, body)` says what happens to a call.

    None: it is passed on. An integer: it is answered with this status. "cut": the connection ends without an answer. "cut after":
    the server has the call, and its answer is lost. A float: seconds to wait before it is passed on. A dict: these fields of the
    answer's meta_info are replaced.
    """

    url: str
    fault: Callable[[str, int, dict], int | float | str | dict | None] = lambda path, count, body: None
    calls: dict[str, int] = dataclasses.field(default_factory=dict)

    @contextmanager
    def listening(self) -> Iterator[str]:
        proxy, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                with lock:
                    count = proxy.calls.get(self.path, 0)
                    proxy.calls[self.path] = count + 1
                said = proxy.fault(self.path, count, json.loads(body) if body else {})
                if isinstance(said, int):
                    return self.answer(said, b"broken on purpose")
                if said == "cut":
                    self.close_connection = True
                    return self.connection.close()
                if isinstance(said, float):
                    time.sleep(said)
                with httpx.Client(trust_env=False, timeout=60) as http:
                    headers = {"content-type": "application/json"}
                    passed = http.request(self.command, proxy.url + self.path, content=body, headers=headers)
                content = passed.content
                if said == "cut after":
                    self.close_connection = True
                    return self.connection.close()
                if isinstance(said, dict):
                    answer = passed.json()
                    answer["meta_info"] |= said
                    content = json.dumps(answer).encode()
                self.answer(passed.status_code, content)

            do_GET = do_POST

            def answer(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments):
                """Not to the output of tests."""

            def handle(self):
                try:
                    super().handle()
                except (OSError, ValueError):  # who asked has gone
                    self.close_connection = True

        class Listener(ThreadingHTTPServer):
            request_queue_size = 128  # connections that come at once: the default is 5

        listener = Listener(("127.0.0.1", 0), Handler)
        listener.daemon_threads = True
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listener.server_address[1]}"
        finally:
            listener.shutdown()
            listener.server_close()
