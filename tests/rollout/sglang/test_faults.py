"""What networks and servers do: each request has exactly one rollout in the end, or the error names the cause."""

import pytest

from megapsft.rollout.base import Sampling
from tests.rollout.sglang.servers import Proxy, answered_once, engine_of, requests, weights

pytestmark = pytest.mark.servers

ON_ONE = {  # what one of two servers does to a request; the other is well
    "500s": lambda path, count, body: 500 if path == "/generate" else None,
    "some 500s": lambda path, count, body: 500 if path == "/generate" and count % 2 == 0 else None,
    "cut before": lambda path, count, body: "cut" if path == "/generate" else None,
    "cut after": lambda path, count, body: "cut after" if path == "/generate" and count < 3 else None,
    "slow": lambda path, count, body: 20.0 if path == "/generate" else None,
    "unhealthy": lambda path, count, body: 503 if path in ("/health", "/generate") and count > 1 else None,
    "an older version": lambda path, count, body: {"weight_version": "1", "weight_versions": []} if path == "/generate" else None,
    "no tokens": lambda path, count, body: {"output_token_logprobs": []} if path == "/generate" and count < 2 else None,
}


@pytest.mark.parametrize("fault", ON_ONE)
def test_one_of_two_servers(two_urls, dense, tmp_path, fault):
    asked, proxy = requests(12), Proxy(two_urls[0], ON_ONE[fault])
    with proxy.listening() as url, engine_of([url, two_urls[1]], dense, tmp_path) as engine:
        engine.load_weights(weights(dense).items(), 1)
        engine.load_weights(weights(dense, 1.1).items(), 2)
        object.__setattr__(engine._config, "request_timeout", 4.0)  # on a busy machine an update may take longer
        rollouts = engine.generate(asked, Sampling(max_tokens=6))
        assert proxy.calls["/generate"] > 0
        if fault == "an older version":
            assert engine.discarded > 0
            assert "it sampled from weight version 1, and the current one is 2" in engine.servers[0].cause
    assert answered_once(asked, rollouts)
    assert {(len(rollout.response_ids), rollout.weight_version) for rollout in rollouts} == {(6, 2)}
    assert engine.retried > 0


@pytest.mark.parametrize(("fault", "cause"), [(500, "/generate: 500: broken on purpose"), (9.0, "no answer within")])
def test_the_only_server(two_urls, dense, tmp_path, fault, cause):
    proxy = Proxy(two_urls[0], lambda path, count, body: fault if path == "/generate" else None)
    with (
        proxy.listening() as url,
        engine_of([url], dense, tmp_path, request_timeout=1.0, retries=1) as engine,
        pytest.raises(RuntimeError, match=cause),
    ):
        engine.generate(requests(2), Sampling(max_tokens=6))


def test_one_that_is_of_another_version_from_the_start_is_not_asked(two_urls, dense, tmp_path):
    """A server outside of the update, such as one that was away: it comes back with old weights, and is left alone."""
    with engine_of(two_urls[:1], dense, tmp_path) as behind:
        behind.load_weights(weights(dense).items(), 30)
    with engine_of(two_urls, dense, tmp_path) as engine:
        assert engine.servers[1].state == "out"  # until the first update they are of different weights
        engine.load_weights(weights(dense).items(), 31)
        first = engine.servers[0]
        with engine_of(two_urls[:1], dense, tmp_path / "behind") as behind:
            behind.load_weights(weights(dense, 1.1).items(), 30)
        engine._pool.take_out(first, "was away")
        asked = requests(8)
        for _ in range(30):
            rollouts = engine.generate(asked, Sampling(max_tokens=2))
            assert answered_once(asked, rollouts)
            assert {rollout.weight_version for rollout in rollouts} == {31}
            if "version" in first.cause:
                break
        assert first.state == "out"
        assert engine.discarded == 0
