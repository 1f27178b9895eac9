"""Several servers as one: who may be asked, who is taken out and why, who comes back, and the weights that all of them have."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megapsft.config import RolloutConfig
from megapsft.errors import Refused
from megapsft.rollout.sglang.checksum import Checksums, Expected, difference, reported, summary
from megapsft.rollout.sglang.client import Client, OtherWeights, Unanswered
from megapsft.rollout.sglang.fleet import CONTROL_SECONDS, LEAST_HEALTH_SECONDS, Fleet, Member
from megapsft.rollout.sglang.server import Server
from megapsft.rollout.sglang.weights import ByGroup, ByMemory, Copy, buckets, read_folder

log = logging.getLogger(__name__)

MISSES = 2  # checks one after the other, until a server counts as hung
FAILURES = 3  # requests one after the other, until a server counts as broken though it is healthy
LONGEST_REST = 600.0  # seconds until a server that fails again and again is looked at again
FLUSH_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Update:
    """What an update of weights was."""

    version: int
    bytes: int
    seconds: float
    paused_seconds: float  # of them, in which no server generated
    servers: int  # that have the new weights
    checksum: str  # of what these servers hold, which is what was sent


class Pool:
    """Servers with the current weights. Every method may be called from any thread.

    A server is asked only while it is `ready`: healthy, and with weights that were checked. One that dies, hangs, fails or has
    other weights is taken out. One that was started here is started again and given the current weights; another comes back once
    it is healthy and has the weights of the current version by their checksums.
    """

    def __init__(
        self, config: RolloutConfig, model: Path, dtype: torch.dtype, urls: Sequence[str], servers: Sequence[Server], work: Path
    ):
        self._owner = os.getpid()
        self._config, self._model, self._dtype, self._folder = config, model, dtype, work / "weights"
        self._lock = threading.RLock()  # of the fields
        self._weights = threading.RLock()  # held by who changes weights
        self._closed = threading.Event()
        self._updating = False
        self._restarts = 0
        self._expected: dict[tuple[int, str], Checksums] = {}  # of (tp_size, device)
        self._copy: Path | None = None
        self._name = "0"  # the current version as servers have it
        self.versions: dict[str, int] = {"0": 0}  # every version that there was
        self.members = [Member(url=url, process=None) for url in urls]
        self.members += [Member(url="http://127.0.0.1:0", process=server) for server in servers]
        self._threads = [
            threading.Thread(target=self._watch, args=(member,), name=f"sglang-{number}", daemon=True)
            for number, member in enumerate(self.members)
        ]

    @property
    def version(self) -> int:
        return self.versions[self._name]

    @property
    def version_name(self) -> str:
        return self._name

    def open(self) -> None:
        """Return when every server is ready, but for given ones whose weights are others than those of the first.

        Raises:
            Refused: one could not be started, or does not answer, with the reason and the last lines of its log.
        """
        if self.members[0].process is None:
            self._read_versions()
        for thread in self._threads:
            thread.start()
        while any(member.state == "starting" or (member.process and member.state == "out") for member in self.members):
            time.sleep(0.05)
        lost = [member for member in self.members if member.state == "ended"]
        if lost:
            remedy = "see the lines above" if lost[0].process else "start it, or correct rollout.urls"
            self.close()
            raise Refused(f"SGLang server {lost[0].url}", lost[0].cause, remedy)

    def _read_versions(self) -> None:
        """The version that servers have which run already: that of the first, until weights are given to them."""
        first = self.members[0]
        try:
            self._name = first.client.about(CONTROL_SECONDS).weight_version
        except Unanswered as error:
            raise Refused(f"rollout.urls: {first.url}", str(error), "start it, or correct rollout.urls") from None
        self.versions = {self._name: int(self._name) if self._name.isdigit() else 0}

    # requests

    def acquire(self, avoid: Member | None = None) -> Member | None:
        """The ready server with the fewest requests, one of which is now more; another than `avoid` where there is one."""
        with self._lock:
            if self._updating or self._closed.is_set():
                return None
            free = [m for m in self.members if m.state == "ready" and m.running < self._config.requests_per_server]
            if not free:
                return None
            chosen = min(free, key=lambda member: (member is avoid, member.running))
            chosen.running += 1
            return chosen

    def release(self, member: Member, failure: str | None = None) -> None:
        """The request has ended; a server that fails several times one after the other is taken out."""
        with self._lock:
            member.running -= 1
            member.failures = member.failures + 1 if failure else 0
            if member.failures >= FAILURES:
                self.take_out(member, f"{member.failures} requests failed one after the other, the last with: {failure}")

    def take_out(self, member: Member, cause: str) -> None:
        with self._lock:
            if member.state not in ("ready", "starting"):
                return
            member.state, member.cause, member.failures = "out", cause, 0
            member.outs += 1
            member.woken.set()
        log.warning("SGLang server %s is taken out: %s", member.url, cause)

    def ready(self) -> list[Member]:
        with self._lock:
            return [member for member in self.members if member.state == "ready"]

    def starting(self) -> bool:
        """A server of ours is on its way back."""
        with self._lock:
            return self._updating or any(m.process and m.state in ("starting", "out") for m in self.members)

    def hopeless(self) -> bool:
        """No server is left, nor will one come back."""
        with self._lock:
            return all(member.state == "ended" for member in self.members)

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def causes(self) -> str:
        with self._lock:
            lost = [f"{member.url}: {member.cause or member.state}" for member in self.members if member.state != "ready"]
        return "; ".join(lost) or "all servers are ready"

    # weights

    def update(self, stream: Iterable[tuple[str, Tensor | None]], version: int, fp8: bool) -> Update:
        """Give all servers these weights; see `SGLang.load_weights`."""
        started = time.monotonic()
        with self._changing():
            fleet = Fleet(self._reachable(), self.take_out)
            try:
                if fp8 and any(member.device == "cpu" for member in self.members):
                    rule = "SGLang on a CPU cannot load fp8 weights: its kernel needs AMX and a build that the registry has not"
                    raise Refused("fp8 rollout weights", rule, "send bf16 weights, or use servers on GPUs")
                size, paused = self._send(fleet, stream, version)
            except BaseException as error:  # of the stream, for one: nobody knows what the servers have now
                fleet.lose(f"{type(error).__name__}: {error}")
                raise
            now = time.monotonic()
            checksum = summary(next(iter(self._expected.values())))
            taken = fleet.targets()
        if not (taken or self.starting()):
            raise RuntimeError(f"no SGLang server has taken the weights of version {version}: {self.causes()}")
        return Update(
            version=version, bytes=size, seconds=now - started, paused_seconds=now - paused, servers=len(taken), checksum=checksum
        )

    def _send(self, fleet: Fleet, stream: Iterable[tuple[str, Tensor | None]], version: int) -> tuple[int, float]:
        """Bytes that were sent, and when the servers were paused."""
        seconds, paused = self._config.request_timeout, time.monotonic()
        kinds = {(member.tp_size, member.device) for member in self.members}
        expected = {kind: Expected(self._model, self._dtype, *kind) for kind in kinds}
        copy = Copy(self._folder, version) if self._keeps_copy() else None
        way = {"tensor": ByMemory, "distributed": ByGroup}.get(self._config.weight_update)
        sender = way(seconds) if way else None
        if sender is not None:
            self._pause(fleet)
            sender.open(fleet)
        allocate = sender.allocate if sender is not None else lambda least, most: torch.empty(most, dtype=torch.uint8)
        size = 0
        for bucket in buckets(stream, self._config.bucket_bytes, allocate):
            for name, tensor in bucket:
                size += tensor.numel() * tensor.element_size()
                for one in expected.values():
                    one.add(name, tensor)
            if copy is not None:
                copy.add(bucket)
            if sender is not None:
                sender.send(fleet, bucket)
        checksums = {kind: one.end() for kind, one in expected.items()}
        folder = copy.end() if copy is not None else None
        if sender is not None:
            sender.close(fleet)
        else:
            paused = time.monotonic()
            self._pause(fleet)
            fleet.each(lambda member: read_folder(member.client, folder, seconds))
        fleet.each(lambda member: self._check(member, checksums))
        fleet.each(lambda member: name_version(member.client, str(version)))
        with self._lock:  # who starts again from now on has these
            self._name, self._copy, self._expected = str(version), folder, checksums
            self.versions[self._name] = version
        fleet.each(lambda member: member.client.post("/continue_generation", CONTROL_SECONDS))
        for member in fleet.targets():
            self._admit(member)
        Copy.forget_others(self._folder, folder)
        return size, paused

    def _keeps_copy(self) -> bool:
        """Servers that are started again have it, without the trainer's ranks; and those that read from disk."""
        return self._config.weight_update == "disk" or (self._config.max_restarts > 0 and any(m.process for m in self.members))

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self._weights:
            with self._lock:
                self._updating = True
            try:
                yield
            finally:
                with self._lock:
                    self._updating = False

    def _reachable(self) -> list[Member]:
        """Ready ones, and others that are not ours and can be spoken to: a whole update makes their weights known."""
        found = self.ready()
        for member in self.members:
            if member.process is None and member.state == "out":
                with suppress(Unanswered):
                    member.has(member.client.about(LEAST_HEALTH_SECONDS))
                    with self._lock:
                        member.state = "starting"
                    found.append(member)
        return found

    def _pause(self, fleet: Fleet) -> None:
        mode = self._config.on_update

        def pause(member: Member) -> None:
            member.client.post("/pause_generation", CONTROL_SECONDS, mode=mode)
            deadline = time.monotonic() + FLUSH_SECONDS
            while True:  # what was computed with the old weights goes; running requests keep theirs where in_place
                try:
                    return member.client.post("/flush_cache", CONTROL_SECONDS)
                except Unanswered as error:
                    if "Flush cache failed" not in str(error) or (mode != "in_place" and time.monotonic() > deadline):
                        raise
                    if mode == "in_place":  # a request finds only what those of its own version left: its extra_key
                        return None
                    time.sleep(0.2)

        fleet.each(pause)

    def _check(self, member: Member, checksums: dict[tuple[int, str], Checksums]) -> None:
        """Raises Unanswered where its weights are not those that were sent."""
        if not checksums:  # nothing was sent yet
            return
        expected = checksums.get((member.tp_size, member.device))
        if expected is None:
            raise OtherWeights("it was started anew with another tp_size: it needs an update")
        answer = member.client.post("/weights_checker", self._config.request_timeout, action="checksum")
        differs = difference(expected, reported(answer))
        if differs:
            raise OtherWeights(f"checksums differ from those of the policy: {differs}")

    def _admit(self, member: Member) -> None:
        with self._lock:
            if not self._closed.is_set():
                member.state, member.cause = "ready", ""
                member.woken.clear()

    # watching over them

    def _watch(self, member: Member) -> None:
        """The life of one server, in a thread of its own, which started it and which it does not outlive."""
        try:
            if member.process is None:
                self._watch_given(member)
            else:
                self._watch_own(member, member.process)
        except Exception as error:  # a server that nobody watches over is not asked
            log.exception("SGLang server %s", member.url)
            self._end(member, f"{type(error).__name__}: {error}")
        finally:
            if member.process is not None:
                member.process.stop()

    def _watch_own(self, member: Member, process: Server) -> None:
        first = True
        while not self._closed.is_set():
            try:
                process.start()
                self._await_start(member, process)
                with self._weights:
                    if self._closed.is_set():
                        return
                    if self._copy is not None:
                        read_folder(member.client, self._copy, self._config.request_timeout)
                    self._check(member, self._expected)
                    name_version(member.client, self._name)
                    self._admit(member)
            except (Unanswered, Refused) as error:
                self.take_out(member, str(error))
            else:
                first = False
                self._stay(member)
            cause = member.cause
            if self._closed.is_set():
                return
            process.kill()  # it may not listen to anything else
            if first:
                return self._end(member, cause)
            if not self._may_restart():
                return self._end(member, f"{cause} (and rollout.max_restarts={self._config.max_restarts} are used up)")
            with self._lock:
                member.state = "starting"
                member.woken.clear()

    def _await_start(self, member: Member, process: Server) -> None:
        """Raises Unanswered, with the last lines of its log, where it ends or is late."""
        member.url = process.url
        member.client = Client(process.url)  # who still speaks to the one before hears that it is gone
        deadline = time.monotonic() + self._config.startup_timeout
        while not self._closed.wait(0.2):
            how = process.ended()
            if how is None and time.monotonic() > deadline:
                how = f"was not healthy within rollout.startup_timeout={self._config.startup_timeout:g} seconds"
            if how is not None:
                raise Unanswered(f"{how}; the last lines of {process.log}:\n{process.last_lines()}")
            if member.client.health(LEAST_HEALTH_SECONDS) is None:
                member.has(member.client.about(CONTROL_SECONDS))
                # what it has made by now stays: on a CPU each flush of its cache, one an update, looks for garbage in all else
                member.client.post("/freeze_gc", CONTROL_SECONDS)
                return

    def _watch_given(self, member: Member) -> None:
        while not self._closed.is_set():
            try:
                with self._weights:
                    self._readmit(member)
            except OtherWeights as error:
                self.take_out(member, str(error))
                member.cause = str(error)
            except (Unanswered, Refused) as error:
                if member.outs == 0:  # the first time: `open` says why
                    return self._end(member, str(error))
                member.cause = str(error)
            if member.state == "ready":
                self._stay(member)
            rest = min(self._config.health_interval * 2 ** min(member.outs - 1, 10), LONGEST_REST)
            self._closed.wait(rest)

    def _readmit(self, member: Member) -> None:
        """Raises Unanswered unless it is healthy and has the current weights."""
        if member.state == "ready":
            return
        wrong = member.client.health(self._health_seconds())
        if wrong is not None:
            raise Unanswered(wrong)
        about = member.client.about(CONTROL_SECONDS)
        member.has(about)
        if about.weight_version != self._name:
            raise OtherWeights(f"it has weight version {about.weight_version!r}, and the current one is {self._name!r}")
        self._check(member, self._expected)
        self._admit(member)

    def _stay(self, member: Member) -> None:
        """Return when the server is no longer ready."""
        misses, due = 0, time.monotonic() + self._config.health_interval
        while not self._closed.is_set():
            member.woken.wait(0.2)
            if member.state != "ready":
                return
            how = member.process.ended() if member.process else None
            if how is not None:
                return self.take_out(member, f"{how}; the last lines of {member.process.log}:\n{member.process.last_lines()}")
            if self._updating or time.monotonic() < due:
                continue
            version = self._name
            wrong = member.client.health(self._health_seconds())
            due = time.monotonic() + self._config.health_interval
            if self._updating or version != self._name:  # a server that is paused has nothing to say
                misses = 0
                continue
            misses = 0 if wrong is None else misses + 1
            if wrong is not None and ("ConnectError" in wrong or misses >= MISSES):
                return self.take_out(member, wrong)

    def _health_seconds(self) -> float:
        return max(self._config.health_interval, LEAST_HEALTH_SECONDS)

    def _may_restart(self) -> bool:
        with self._lock:
            self._restarts += 1
            return self._restarts <= self._config.max_restarts

    def _end(self, member: Member, cause: str) -> None:
        with self._lock:
            member.state, member.cause = "ended", cause

    def close(self) -> None:
        """End the servers that were started here, and the threads."""
        if os.getpid() != self._owner:  # a fork of it has these servers only by name
            return
        self._closed.set()
        for member in self.members:
            member.woken.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        for member in self.members:
            member.client.close()
        Copy.forget_others(self._folder, None)


def name_version(client: Client, name: str) -> None:
    client.post("/update_weight_version", CONTROL_SECONDS, new_version=name, abort_all_requests=False)
