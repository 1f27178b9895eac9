"""The parent's end of one worker: asks it, waits no longer than allowed, and kills it where it does not answer."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megapsft.errors import Refused
from megapsft.platform.launch import LAUNCHED

LOAD_SECONDS = 120.0  # to start Python and import a target, on a busy machine with cold disks
CLOSE_SECONDS = 2.0

Failure = Literal["timeout", "died", "error"]


@dataclass(frozen=True)
class Outcome:
    """A finite value, or why there is none: the call was late, its process ended, or it raised."""

    value: float = 0.0
    failure: Failure | None = None
    message: str = ""


class Process:
    """A worker of its own process group, which ends with the thread that made it; asked by that thread alone, closed by any."""

    def __init__(self, memory_bytes: int):
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)  # a target is found as it is found here
        self._popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "megapsft.rewards._worker", str(memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path, LAUNCHED: str(os.getpid())},
            process_group=0,  # to kill what it starts as well, and to leave Ctrl-C to us
        )
        self._loaded: set[tuple[str, int, tuple[str, ...]]] = set()
        self._killed = False
        self._asking = threading.Lock()

    @property
    def alive(self) -> bool:
        """Whether it can be asked: nobody killed it since it answered last."""
        if self._killed:
            return False
        if self._says_something(0):  # unasked: its end of the pipe is closed
            self.kill()
        return not self._killed

    def load(self, target: str, positional: int, options: Mapping[str, Any]) -> None:
        """Import the target, unless it has been, and see that it takes so many arguments and these options.

        Raises:
            Refused: it does not, or not within LOAD_SECONDS.
        """
        key = (target, positional, tuple(options))
        if key in self._loaded:
            return
        outcome = self._ask({"load": target, "positional": positional, "options": dict(options)}, LOAD_SECONDS)
        if outcome.failure is not None:
            rule = f"cannot be called with {positional} arguments and {', '.join(options) or 'no options'}: {outcome.message}"
            raise Refused(f"reward {target}", rule, "mend it, or name another function")
        self._loaded.add(key)

    def call(self, target: str, arguments: Sequence[Any], options: Mapping[str, Any], seconds: float) -> Outcome:
        """What the target returns for the arguments, within so many seconds of wall-clock time; the import does not count.

        Raises:
            Refused: the target cannot be loaded, or the arguments are not JSON.
        """
        self.load(target, len(arguments), options)
        return self._ask({"call": target, "arguments": list(arguments), "options": dict(options)}, seconds)

    def _ask(self, request: Mapping[str, Any], seconds: float) -> Outcome:
        line = _encoded(request)
        with self._asking:
            return self._exchange(line, seconds)

    def _exchange(self, line: bytes, seconds: float) -> Outcome:
        late = threading.Event()
        timer = threading.Timer(seconds, lambda: (late.set(), self._send_kill()))
        timer.daemon = True
        timer.start()
        reply = b""
        try:
            with contextlib.suppress(OSError):  # it has ended, which the empty reply says too
                self._popen.stdin.write(line)
                self._popen.stdin.flush()
                reply = self._popen.stdout.readline()
        finally:
            timer.cancel()
            timer.join()
            if late.is_set() or not reply.endswith(b"\n"):
                self.kill()
        if reply.endswith(b"\n"):
            answer = json.loads(reply)
            return Outcome(answer["value"]) if "value" in answer else Outcome(failure="error", message=answer["error"])
        if late.is_set():
            return Outcome(failure="timeout", message=f"no answer within {seconds:g} s")
        return Outcome(failure="died", message=f"its process ended, {_ending(self._popen.returncode)}")

    def _says_something(self, seconds: float) -> bool:
        said = select.poll()
        said.register(self._popen.stdout, select.POLLIN)
        return bool(said.poll(seconds * 1000))

    def _send_kill(self) -> None:
        # not Popen.kill, which would reap a worker that ended by itself and then spare the processes that it left behind
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)

    def kill(self) -> None:
        """End it now, and what it started. Nothing where that is done."""
        if not self._killed:
            self._killed = True
            self._send_kill()
            self._popen.wait()
            self._close_pipes()

    def close(self) -> None:
        """Let it end by itself, after the call that it may be in; kill it where it does not."""
        with self._asking:
            if self._killed:
                return
            with contextlib.suppress(OSError):
                self._popen.stdin.close()
            self._says_something(CLOSE_SECONDS)
            self.kill()

    def _close_pipes(self) -> None:
        for pipe in (self._popen.stdin, self._popen.stdout):
            with contextlib.suppress(OSError):  # what it has not read is lost with it
                pipe.close()


def _encoded(request: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(request, default=lambda value: value.tolist()).encode() + b"\n"  # ASCII: lone surrogates survive
    except (TypeError, ValueError, AttributeError) as error:
        raise Refused("a row", f"cannot be sent to a reward as JSON: {error}", "keep text and numbers in it") from None


def _ending(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
