"""SGLang's router given as a url: the servers that it has, which are asked themselves."""

from __future__ import annotations

from typing import Any

import httpx

from megapsft.errors import Refused
from megapsft.rollout.sglang.client import checked_url

SECONDS = 10.0


def servers_behind(url: str) -> list[str]:
    """The workers of the router at `url`, or `url` itself where anything else is there, which others find out.

    Every server must get the weights, and of every rollout the server's version must be known: nothing is ever asked of the
    router itself.

    Raises:
        Refused: it has no workers, or others than those that answer HTTP requests as a whole.
    """
    try:
        answer = httpx.get(f"{url}/workers", timeout=SECONDS, trust_env=False, follow_redirects=False)
        found = answer.json() if answer.status_code == 200 else None
    except (httpx.HTTPError, ValueError):
        return [url]
    workers: Any = found.get("workers") if isinstance(found, dict) else None
    if not isinstance(workers, list):
        return [url]
    if not workers:
        raise Refused(f"rollout.urls: {url}", "is a router without workers", "start servers behind it, or name servers")
    for worker in workers:
        kind, mode = worker.get("worker_type", "regular"), str(worker.get("connection_mode", "http")).lower()
        if (kind, mode) != ("regular", "http"):
            rule = f"is a router, whose worker {worker.get('url')} is {kind} over {mode}"
            raise Refused(f"rollout.urls: {url}", rule, "use regular HTTP servers for rollouts")
    return [checked_url(worker["url"]) for worker in workers]
