"""The engine: requests to the servers of a pool, each answered exactly once."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import logging
import math
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import torch
from torch import Tensor

from megapsft.config import RolloutConfig
from megapsft.errors import Refused
from megapsft.rollout.base import Request, Rollout, Sampling
from megapsft.rollout.sglang.client import Rejected, Unanswered, checked_url, generate, on_loopback
from megapsft.rollout.sglang.fleet import Member
from megapsft.rollout.sglang.pool import Pool, Update
from megapsft.rollout.sglang.router import servers_behind
from megapsft.rollout.sglang.server import Server, find_python

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
ABORT_SECONDS = 30.0  # for what is aborted to come back; what has not by then comes back without what it has of late


@dataclass(eq=False)
class Job:
    """A request on its way to its one rollout."""

    index: int
    request: Request
    so_far: Rollout | None  # its beginning, from servers that were told to stop
    failures: tuple[str, ...] = ()
    avoid: Member | None = None
    rid: str = ""
    member: Member | None = None
    floor: int = 0  # the version when it was asked
    outs: int = 0  # how often its server had been taken out by then
    told: float = -math.inf  # when the server was told to abort it


class SGLang:
    """SGLang servers, started here or given by their urls, as an `Engine`.

    Servers that are started here begin with the weights of `model`, which are version 0. Those given by urls keep theirs until
    the first `load_weights`; until then, those that report another version than the first of them are not asked.

    Args:
        model: the Hugging Face folder of the policy.
        work: a folder for logs of servers and for the copy of the weights from which they start again.
        dtype: of the policy and the servers' weights.
        first: whether this is the rank that speaks to the servers. On the others `load_weights` drains its stream, which is a
            collective of the trainer, and nothing else.

    Raises:
        Refused: SGLang is not installed, a server cannot be started or reached, a port is in use, or weights cannot get to a url.
    """

    def __init__(
        self, config: RolloutConfig, model: Path, *, work: Path, dtype: Literal["float32", "bfloat16"], first: bool = True
    ):
        self._config, self._model, self._first = config, Path(model), first
        self._rid, self._count = f"megapsft-{uuid.uuid4().hex[:8]}", itertools.count()
        self.discarded = 0  # rollouts of weights that were not the engine's
        self.retried = 0  # requests that were asked again
        self.last_update: Update | None = None
        self._pool: Pool | None = None
        if not first:
            return
        urls = list(dict.fromkeys(server for url in config.urls for server in servers_behind(checked_url(url))))
        if config.weight_update == "tensor" and not all(map(on_loopback, urls)):
            rule = "goes through memory of this host, and another host is in rollout.urls"
            raise Refused("rollout.weight_update=tensor", rule, "use distributed, or disk on a shared file system")
        servers = [] if urls else self._servers(Path(work), dtype)
        self._pool = Pool(config, self._model, getattr(torch, dtype), urls, servers, Path(work))
        self._end = weakref.finalize(self, self._pool.close)
        self._pool.open()
        hf = json.loads((self._model / "config.json").read_text())
        self._experts_per_token = hf.get("num_experts_per_tok") or 1

    def _servers(self, work: Path, dtype: str) -> list[Server]:
        python = find_python(self._config.python)
        return [
            Server(
                python=python, model=self._model, dtype=dtype, tp_size=self._config.tensor_parallel_size,
                port=self._config.port and self._config.port + number, arguments=self._config.server_args,
                log=work / f"server-{number}.log",
            )  # fmt: skip
            for number in range(self._config.servers)
        ]

    @property
    def version(self) -> int:
        """Of the weights that are sampled from."""
        return self._speaker().version

    @property
    def servers(self) -> list[Member]:
        """The servers and what is known of them; to look at."""
        return self._speaker().members

    def load_weights(self, stream: Iterable[tuple[str, Tensor | None]], version: int, *, fp8: bool = False) -> None:
        """Sample from these weights henceforth.

        Generation is paused as `rollout.on_update` has it: what runs is aborted, and asked for again from where it was (`abort`),
        computed anew with the new weights up to where it was (`retract`), or goes on as if nothing was (`in_place`). The servers'
        checksums are compared with those of the stream before they are sampled from; one whose weights are not these, or that
        failed on the way, is taken out.

        Args:
            stream: of the exporter; on ranks other than the first, (name, None).
            fp8: the stream has weights in fp8 with their scales; only for servers on GPUs.

        Raises:
            Refused: fp8 on a CPU.
            RuntimeError: no server has the weights, nor will have them.
        """
        rest = iter(stream)
        try:
            if self._first:
                self.last_update = self._speaker().update(rest, version, fp8)
        finally:
            for _ in rest:  # the other ranks wait in it
                pass

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, enough: Callable[[int, Rollout], bool] | None = None
    ) -> list[Rollout]:
        """One rollout for each request, in their order. See `Engine`; `sampling.seed` is not used: SGLang draws from its own.

        Raises:
            RuntimeError: a request failed on `rollout.retries` + 1 servers, or no server is left; it names the causes. Or the
                engine was closed meanwhile.
            Refused: a server rejected a request.
        """
        return asyncio.run(_Generation(self, requests, sampling, enough).run())

    def close(self) -> None:
        if self._pool is not None:
            self._end()

    def _speaker(self) -> Pool:
        if self._pool is None:
            raise Refused("SGLang.generate", "is for the first rank", "call it where first=True")
        return self._pool


class _Generation:
    """One call of `generate`: the jobs that wait, the ones on their way, and the rollouts that there are."""

    def __init__(
        self, engine: SGLang, requests: Sequence[Request], sampling: Sampling, enough: Callable[[int, Rollout], bool] | None
    ):
        self._engine, self._pool, self._config = engine, engine._speaker(), engine._config
        self._sampling, self._enough = sampling, enough
        self._found: dict[int, Rollout] = {}
        self._waiting: deque[Job] = deque()
        self._running: dict[asyncio.Task[dict[str, Any]], Job] = {}
        self._asides: set[asyncio.Task[None]] = set()
        self._stopped: float | None = None  # when there was enough
        self._size = len(requests)
        for index, request in enumerate(requests):
            partial = request.partial
            if partial is not None and partial.prompt_ids != request.prompt_ids:
                raise Refused(f"request {index}: partial", "is of another prompt", "go on with a rollout of the same prompt")
            self._waiting.append(Job(index, request, partial))

    async def run(self) -> list[Rollout]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        async with httpx.AsyncClient(trust_env=False, follow_redirects=False, limits=limits) as self._http:
            try:
                await self._loop()
            finally:
                for task, job in self._running.items():
                    task.cancel()
                    self._pool.release(job.member)
                    self._abort(job)
                await asyncio.gather(*self._running, *self._asides, return_exceptions=True)
        assert sorted(self._found) == list(range(self._size))
        return [self._found[index] for index in range(self._size)]

    async def _loop(self) -> None:
        last = time.monotonic()  # when a server was ready
        while self._waiting or self._running:
            if self._pool.closed:
                raise RuntimeError("the engine was closed")
            if self._stopped is None:
                self._send()
            else:
                self._give_up_waiting()
            if self._running:
                await asyncio.wait(self._running, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            elif self._waiting:
                await asyncio.sleep(POLL_SECONDS)
            for task in [task for task in self._running if task.done()]:
                await self._ended(task, self._running.pop(task))
            for task in [task for task, job in self._running.items() if job.member.outs != job.outs]:
                self._lost(task, self._running.pop(task))
            if self._pool.ready() or self._pool.starting() or self._running:
                last = time.monotonic()
            late = time.monotonic() - last > self._config.request_timeout
            if self._waiting and (self._pool.hopeless() or late):
                raise RuntimeError(f"no SGLang server is left for {len(self._waiting)} requests: {self._pool.causes()}")

    def _send(self) -> None:
        while self._waiting:
            job = self._waiting[0]
            if self._full(job):
                self._waiting.popleft()
                self._found[job.index] = replace(job.so_far, finish_reason="length")
                continue
            member = self._pool.acquire(job.avoid)
            if member is None:
                return
            self._waiting.popleft()
            job.member, job.outs, job.floor = member, member.outs, self._pool.version
            job.rid = f"{self._engine._rid}-{next(self._engine._count)}"
            self._running[asyncio.create_task(self._ask(job, self._body(job)))] = job

    def _full(self, job: Job) -> bool:
        return job.so_far is not None and len(job.so_far.response_ids) >= self._sampling.max_tokens

    async def _ask(self, job: Job, body: dict[str, Any]) -> dict[str, Any]:
        seconds = self._config.request_timeout
        try:
            async with asyncio.timeout(seconds):  # of all of it: a server may send a byte now and then
                return await generate(self._http, job.member.url, body, seconds)
        except TimeoutError:
            raise Unanswered(f"/generate: no answer within rollout.request_timeout={seconds:g} seconds") from None

    def _body(self, job: Job) -> dict[str, Any]:
        sampling, begun = self._sampling, job.so_far.response_ids if job.so_far else ()
        return {
            "rid": job.rid,
            "input_ids": [*job.request.prompt_ids, *begun],
            "sampling_params": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "max_new_tokens": sampling.max_tokens - len(begun),
                "stop_token_ids": list(sampling.stop_token_ids) or None,
            },
            "return_logprob": True,
            "return_routed_experts": job.member.routed_experts,
            "extra_key": self._pool.version_name,  # no keys and values of other weights, also where they could not be flushed
        }

    async def _ended(self, task: asyncio.Task[dict[str, Any]], job: Job) -> None:
        if job.member.outs != job.outs:
            task.exception()
            return self._lost(task, job)
        try:
            answer = task.result()
            rollout = self._rollout(job, answer)
        except Rejected as error:
            self._pool.release(job.member)
            raise Refused(f"request {job.index}", f"was rejected: {error}", "see rollout.max_tokens, data.max_length") from None
        except Unanswered as error:
            self._pool.release(job.member, str(error))
            self._abort(job)
            return self._again(job, str(error))
        if rollout is None:
            self._pool.release(job.member)
            return self._again(job, "its weights were of another version")
        self._pool.release(job.member)
        if rollout.finish_reason == "stop" and rollout.response_ids[-1] not in self._sampling.stop_token_ids:
            rollout = replace(rollout, finish_reason="abort")  # an end of its config.json, which the sampling does not have
        if rollout.finish_reason == "abort" and self._stopped is None:  # an update stopped it: it goes on from there
            job.so_far, job.avoid = rollout, None
            self._waiting.append(job)
            return
        await self._finish(job, rollout)

    async def _finish(self, job: Job, rollout: Rollout) -> None:
        assert job.index not in self._found
        self._found[job.index] = rollout
        if self._enough is None or rollout.finish_reason == "abort" or self._stopped is not None:
            return
        if await asyncio.to_thread(self._enough, job.index, rollout):
            self._stopped = time.monotonic()

    def _give_up_waiting(self) -> None:
        """There is enough: what waits comes back as it stands, and what runs is told to."""
        while self._waiting:
            job = self._waiting.popleft()
            self._found[job.index] = self._as_it_stands(job)
        late = time.monotonic() - self._stopped > ABORT_SECONDS
        for task, job in list(self._running.items()):
            if late:
                del self._running[task]
                task.cancel()
                self._pool.release(job.member)
                self._found[job.index] = self._as_it_stands(job)
            elif time.monotonic() - job.told > 1:  # again, as it may have come before the request was known
                job.told = time.monotonic()
                self._abort(job)

    def _as_it_stands(self, job: Job) -> Rollout:
        if job.so_far is not None:
            return replace(job.so_far, finish_reason="abort")
        return Rollout(
            prompt_ids=job.request.prompt_ids, response_ids=(), rollout_logprobs=(), finish_reason="abort",
            weight_version=self._pool.version,
        )  # fmt: skip

    def _lost(self, task: asyncio.Task[dict[str, Any]], job: Job) -> None:
        """Its server was taken out: whatever it would still say is not heard."""
        task.cancel()
        self._pool.release(job.member)
        self._abort(job)
        self._again(job, job.member.cause)

    def _again(self, job: Job, cause: str) -> None:
        job.failures += (f"{job.member.url}: {cause}",)
        if len(job.failures) > self._config.retries and self._stopped is None:
            self._waiting.append(job)
            causes = "; ".join(job.failures)
            raise RuntimeError(f"request {job.index} has no response after {len(job.failures)} servers were asked: {causes}")
        self._engine.retried += 1
        job.avoid = job.member
        self._waiting.append(job)

    def _abort(self, job: Job) -> None:
        """Tell the server, without waiting for it, that nobody waits."""
        task = asyncio.create_task(self._post_abort(job))
        self._asides.add(task)
        task.add_done_callback(self._asides.discard)

    async def _post_abort(self, job: Job) -> None:
        with contextlib.suppress(httpx.HTTPError):
            await self._http.post(f"{job.member.url}/abort_request", json={"rid": job.rid}, timeout=2.0)

    def _rollout(self, job: Job, answer: dict[str, Any]) -> Rollout | None:
        """What there is of the response now; None where other weights made it.

        Raises:
            Unanswered: the answer is not one to this request.
        """
        meta = answer["meta_info"]
        names = {span["version"] for span in meta.get("weight_versions") or ()} or {meta.get("weight_version")}
        versions = [self._pool.versions.get(name, -1) for name in names]
        if any(not job.floor <= version <= self._pool.version for version in versions):
            self._engine.discarded += 1
            found, wanted = ", ".join(sorted(map(str, names))), self._pool.version_name
            self._pool.take_out(job.member, f"it sampled from weight version {found}, and the current one is {wanted}")
            return None
        drawn = meta.get("output_token_logprobs") or []
        reason = (meta.get("finish_reason") or {}).get("type")
        if reason not in ("stop", "length", "abort") or len(drawn) != len(answer.get("output_ids") or []):
            raise Unanswered(f"/generate: not a whole response: finish_reason {reason!r}, {len(drawn)} log-probabilities")
        if reason != "abort" and not drawn:
            raise Unanswered("/generate: a response without a token")
        before, prompt = job.so_far, job.request.prompt_ids
        response = tuple(int(token) for _, token, *_ in drawn)
        return Rollout(
            prompt_ids=prompt,
            response_ids=(*(before.response_ids if before else ()), *response),
            rollout_logprobs=(*(before.rollout_logprobs if before else ()), *(float(logprob) for logprob, *_ in drawn)),
            finish_reason=reason,
            weight_version=min([*versions, *([before.weight_version] if before and before.response_ids else [])]),
            routed_experts=self._routed(meta.get("routed_experts"), before, len(prompt) + len(response) - 1),
        )

    def _routed(self, encoded: str | None, before: Rollout | None, drawn: int) -> np.ndarray | None:
        """[prompt + response - 1, MoE layers, K]: of the tokens before as they were routed then, of the others from this answer.

        Args:
            drawn: prompt + tokens that were drawn now - 1.
        """
        begun = None if before is None else before.routed_experts
        if encoded is None or not encoded:
            return begun
        rows = drawn + (len(before.response_ids) if before else 0)
        try:
            found = np.frombuffer(base64.b64decode(encoded), dtype=np.int32).reshape(rows, -1, self._engine._experts_per_token)
        except ValueError as error:
            raise Unanswered(f"/generate: routed_experts: {error}") from None
        return found if begun is None else np.concatenate([begun, found[len(begun) :]])
