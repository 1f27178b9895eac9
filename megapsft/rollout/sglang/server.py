"""One server's processes: which interpreter has SGLang, how it is started, and how it is ended with nothing left of it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from megapsft.errors import Refused
from megapsft.platform.interpreter import Elsewhere

SERVE = Path(__file__).with_name("serve.py")
SGLANG = Elsewhere(
    name="SGLang", module="sglang", target="sglang", variable="MEGAPSFT_SGLANG_PYTHON", wanted="rollout.engine=sglang",
    key="rollout.python",
)  # fmt: skip
OURS = {"--host", "--port", "--model-path", "--model", "--dtype", "--tp-size", "--tensor-parallel-size", "--tp"}
OURS |= {"--weight-version", "--device"}
# of torchrun, whose world a server would join; and the one that changes what its log-probabilities are
NOT_FOR_SERVERS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
NOT_FOR_SERVERS |= {"SGLANG_RETURN_ORIGINAL_LOGPROB"}
LOOPBACK = "127.0.0.1"
TERM_SECONDS, KILL_SECONDS = 10.0, 10.0
LAST_LINES = 20
PORTS = range(20000, 32000)  # Linux connects from 32768 on, other systems from 49152
_choosing = threading.Lock()
_given: set[int] = set()  # by `free_port`


class Server:
    """A server on this machine: at most one process group at a time, which is ended by `stop` or with this process.

    The thread that calls `start` must live as long as the server: the kernel ends the server with it.
    """

    def __init__(
        self,
        *,
        python: Path,
        model: Path,
        dtype: str,
        tp_size: int,
        port: int,
        arguments: Sequence[str],
        log: Path | None,
        host: str = LOOPBACK,
    ):
        """
        Args:
            port: 0 for any that is free, anew with each start.
            log: None for this process's own output.
            host: name or address that it listens on; others than loopback are reached by whoever reaches this machine.
        """
        for argument in arguments:
            if argument.split("=")[0] in OURS:
                remedy = "leave it out: rollout.* and model.* have it"
                raise Refused(f"rollout.server_args: {argument}", "is set by the engine", remedy)
        self._command = [str(python), str(SERVE), str(os.getpid()), "--model-path", str(model), "--host", host]
        self._options = ["--dtype", dtype, "--tp-size", str(tp_size), "--skip-tokenizer-init", "--skip-server-warmup"]
        self._options += ["--weight-version", "0", "--log-level", "warning", *arguments]
        self._host, self._wanted, self.port, self.log = host, port, port, log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://{self._host}:{self.port}"

    @property
    def pid(self) -> int | None:
        return self._process and self._process.pid

    def start(self) -> None:
        """Raises Refused where its port is in use."""
        if self._wanted:
            check_free(self._wanted, self._host)
        self.port = self._wanted or free_port()
        environment = {k: v for k, v in os.environ.items() if k not in NOT_FOR_SERVERS and not k.startswith("TORCHELASTIC_")}
        environment |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        if self._host == LOOPBACK and sys.platform.startswith("linux"):
            environment |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        with contextlib.ExitStack() as files:
            log = None
            if self.log is not None:
                self.log.parent.mkdir(parents=True, exist_ok=True)
                log = files.enter_context(self.log.open("ab"))
            self._process = subprocess.Popen(
                [*self._command, "--port", str(self.port), *self._options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log and subprocess.STDOUT, env=environment, start_new_session=True,
            )  # fmt: skip

    def ended(self) -> str | None:
        """How, where it has."""
        code = self._process.poll() if self._process else None
        if code is None:
            return None
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def stop(self) -> None:
        """SIGTERM to its main process alone (SGLang takes one to its group for a crash), then SIGKILL to what is left."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(TERM_SECONDS)
        self.kill()

    def kill(self) -> None:
        """SIGKILL to its process group, of which it is the leader."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(KILL_SECONDS)
        self._process = None

    def last_lines(self) -> str:
        """The end of its log."""
        if self.log is None:
            return "(above)"
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 16384))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return "(no log)"
        return "\n".join(line[:500] for line in lines[-LAST_LINES:])


def free_port() -> int:
    """A port that nobody listens on, and that was given to no other server of this process.

    It is below those that kernels give to outgoing connections, so that none of them takes it until the server listens.
    """
    with _choosing:
        for port in random.Random().sample(PORTS, len(PORTS)):
            if port not in _given and why_not(port) is None:
                _given.add(port)
                return port
    raise Refused("rollout.port=0", f"no port of {PORTS.start} to {PORTS.stop - 1} is free", "name one that is")


def check_free(port: int, host: str = LOOPBACK) -> None:
    reason = why_not(port, host)
    if reason is not None:
        remedy = "use rollout.port=0 for any that is free, or end what listens there"
        raise Refused(f"rollout.port={port}", f"cannot be listened on: {reason}", remedy)


def why_not(port: int, host: str = LOOPBACK) -> str | None:
    """The reason for which it cannot be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror
    return None


def find_python(configured: str | None) -> Path:
    """The interpreter that has SGLang: the configured one, $MEGAPSFT_SGLANG_PYTHON, .venv-sglang, or this one."""
    return SGLANG.find_python(configured)
