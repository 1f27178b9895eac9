"""A server for runs that are elsewhere: started, and stayed with until it ends."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from megapsft.errors import Refused
from megapsft.rollout.sglang.client import Client
from megapsft.rollout.sglang.server import Server

POLL_SECONDS, HEALTH_SECONDS = 0.5, 5.0


def stay_with(server: Server, *, startup_timeout: float, ready: Path | None) -> int:
    """Start it, say when it answers, and return its exit code once it has ended; SIGTERM and SIGINT end it.

    Args:
        startup_timeout: seconds until it must be healthy.
        ready: file that is made when it is.

    Raises:
        Refused: its port is in use, or it was not healthy in time.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    server.start()
    try:
        deadline = time.monotonic() + startup_timeout
        client = Client(server.url)
        while server.ended() is None and client.health(HEALTH_SECONDS) is not None:
            if time.monotonic() > deadline:
                rule = f"was not healthy within rollout.startup_timeout={startup_timeout:g} seconds"
                raise Refused(server.url, rule, "see what it said above, or wait longer")
            time.sleep(POLL_SECONDS)
        if server.ended() is None:
            print(f"{server.url} is ready", flush=True)
            if ready is not None:
                ready.touch()
        while server.ended() is None:
            time.sleep(POLL_SECONDS)
        print(f"{server.url} {server.ended()}", flush=True)
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        server.stop()


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
