"""The servers of a pool, and those of them that take part in an update of weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from megapsft.rollout.sglang.client import About, Client, Unanswered
from megapsft.rollout.sglang.server import Server

CONTROL_SECONDS = 30.0  # of a call that has nothing to wait for
LEAST_HEALTH_SECONDS = 5.0  # SGLang's own check takes one at least, and a prefill may be in its way


@dataclass(eq=False, kw_only=True)
class Member:
    """A server in the pool, with the thread that watches over it."""

    url: str
    process: Server | None  # where it is ours
    client: Client = field(init=False)
    state: Literal["starting", "ready", "out", "ended"] = "starting"
    cause: str = ""  # why it is out or ended
    device: str = "cpu"
    tp_size: int = 1
    routed_experts: bool = False
    running: int = 0  # requests
    failures: int = 0  # of requests, one after the other
    outs: int = 0  # how often it was taken out
    woken: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.client = Client(self.url)

    def has(self, about: About) -> None:
        self.device, self.tp_size, self.routed_experts = about.device, about.tp_size, about.routed_experts


class Fleet:
    """The servers that take part in an update; who fails is taken out of the pool.

    Args:
        take_out: of the pool: the server, and why.
    """

    def __init__(self, members: Sequence[Member], take_out: Callable[[Member, str], None]):
        self._members, self._take_out = list(members), take_out

    def targets(self) -> list[Member]:
        return list(self._members)

    def lose(self, cause: str) -> None:
        """All of them."""
        for member in self.targets():
            self._lose(member, cause)

    def _lose(self, member: Member, cause: str) -> None:
        self._members.remove(member)
        self._take_out(member, f"its weights are not known: {cause}")
        for path in ("/end_weight_update", "/continue_generation"):  # so that it answers, though nobody asks
            with suppress(Unanswered):
                member.client.post(path, LEAST_HEALTH_SECONDS)

    def each(self, call: Callable[[Member], Any], meanwhile: Callable[[], None] | None = None) -> None:
        """Call for all at once; `meanwhile` runs in this thread, and where it fails all have failed."""
        if not self._members:
            return
        with ThreadPoolExecutor(len(self._members), thread_name_prefix="weights") as threads:
            calls = {member: threads.submit(call, member) for member in self._members}
            failed: dict[Member, str] = {}
            if meanwhile is not None:
                try:
                    meanwhile()
                except (RuntimeError, OSError, Unanswered) as error:  # of torch.distributed: RuntimeError and its kin
                    failed = {member: f"{type(error).__name__}: {error}".splitlines()[0] for member in self._members}
            for member, answer in calls.items():
                try:
                    answer.result()
                except Unanswered as error:
                    failed[member] = str(error)
        for member, cause in failed.items():
            self._lose(member, cause)


__all__ = ["CONTROL_SECONDS", "LEAST_HEALTH_SECONDS", "Fleet", "Member"]
