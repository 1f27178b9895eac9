"""HTTP with one server: its control calls, and what its failures are called. Retries belong to the pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from megapsft.errors import Refused

CONNECT_SECONDS = 10.0


class Unanswered(Exception):
    """The server gave no answer, or not a good one: another may."""


class OtherWeights(Unanswered):
    """The server is well, and its weights are not the current ones."""


class Rejected(Exception):
    """The server will never answer this request, nor will another."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What a server says of itself."""

    weight_version: str
    device: str
    tp_size: int
    routed_experts: bool  # it can return which experts each token was sent to


class Client:
    """The control calls of one server, from any thread."""

    def __init__(self, url: str):
        self.url = url
        # never through a proxy of the environment, never to where an answer points
        self._http = httpx.Client(base_url=url, trust_env=False, follow_redirects=False)

    def post(self, path: str, seconds: float, **body: Any) -> Any:
        """The JSON answer, or its text where it is none.

        Raises:
            Unanswered: no answer in time, or one that says that it failed.
        """
        return self._call("POST", path, seconds, body)

    def about(self, seconds: float) -> About:
        info, live = (self._call("GET", path, seconds) for path in ("/server_info", "/model_info"))
        for key in ("pp_size", "dp_size", "ep_size"):  # their weights lie otherwise than checksum.py knows
            if info.get(key, 1) != 1:
                raise Refused(f"{self.url}: {key}={info[key]}", "must be 1 for rollouts", "start it with tp_size alone")
        return About(
            weight_version=str(live["weight_version"]),
            device=str(info.get("device")),
            tp_size=int(info["tp_size"]),
            routed_experts=bool(info.get("enable_return_routed_experts")),
        )

    def health(self, seconds: float) -> str | None:
        """None where it has generated a token; what is wrong otherwise. It takes a second at least, as SGLang has it."""
        try:
            self._call("GET", "/health", seconds)
        except Unanswered as error:
            return str(error)
        return None

    def close(self) -> None:
        self._http.close()

    def _call(self, method: str, path: str, seconds: float, body: Any = None) -> Any:
        timeout = httpx.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS))
        try:
            answer = self._http.request(method, path, json=body, timeout=timeout)
        except httpx.HTTPError as error:
            raise Unanswered(f"{path}: {said(error, seconds)}") from None
        return content_of(answer, path)


async def generate(http: httpx.AsyncClient, url: str, body: dict[str, Any], seconds: float) -> dict[str, Any]:
    """One response.

    Raises:
        Unanswered: no answer in time, or a failure of the server.
        Rejected: the request itself is at fault.
    """
    timeout = httpx.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS))
    try:
        answer = await http.post(f"{url}/generate", json=body, timeout=timeout)
    except httpx.HTTPError as error:
        raise Unanswered(f"/generate: {said(error, seconds)}") from None
    if 400 <= answer.status_code < 500 and answer.status_code not in (408, 429):
        raise Rejected(f"{url}/generate: {answer.status_code}: {answer.text[:500]}")
    found = content_of(answer, "/generate")
    if not isinstance(found, dict) or "meta_info" not in found:
        raise Unanswered(f"/generate: no response in its answer: {answer.text[:200]!r}")
    return found


def content_of(answer: httpx.Response, path: str) -> Any:
    """Raises Unanswered where the answer says that it failed."""
    if answer.status_code != 200:
        raise Unanswered(f"{path}: {answer.status_code}: {answer.text[:500]}")
    try:
        found = answer.json()
    except ValueError:
        return answer.text
    if isinstance(found, dict) and found.get("success") is False:
        raise Unanswered(f"{path}: {found.get('message')}")
    return found


def said(error: httpx.HTTPError, seconds: float) -> str:
    """What went wrong, in words."""
    if isinstance(error, httpx.TimeoutException):
        return f"no answer within {seconds:g} seconds"
    return f"{type(error).__name__}: {error}".rstrip(": ")


def checked_url(url: str) -> str:
    """`http://host:port`, or a refusal."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or parts.path.strip("/") or parts.query or parts.username:
        raise Refused(f"rollout.urls: {url!r}", "must be http://HOST:PORT", "such as http://127.0.0.1:30000")
    return f"http://{parts.netloc}"


def on_loopback(url: str) -> bool:
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
