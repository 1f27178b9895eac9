"""Weights into real servers: three ways, versions and checksums of both sides, one wrong bit, an update that is cut in half."""

import threading

import pytest
import torch

from megapsft.errors import Refused
from megapsft.rollout.base import Sampling
from megapsft.rollout.sglang.client import Client
from megapsft.rollout.sglang.shared_memory import allocate, payload
from tests.rollout.sglang.servers import Proxy, answered_once, engine_of, requests, weights

pytestmark = pytest.mark.servers


@pytest.mark.parametrize("way", ["tensor", "disk", "distributed"])
def test_three_updates(two_urls, dense, tmp_path, way):
    """In buckets of a few tensors; after each both servers have the version and, by their own checksums, the weights."""
    checksums = set()
    with engine_of(two_urls, dense, tmp_path, weight_update=way, bucket_bytes=2**16) as engine:
        for version in (1, 2, 3):
            sent = weights(dense, 1 + version / 8)
            engine.load_weights(iter(sent.items()), version)
            done = engine.last_update
            assert (done.version, done.servers, engine.version) == (version, 2, version)
            assert done.bytes == sum(tensor.numel() * 4 for tensor in sent.values())
            for url in two_urls:
                assert Client(url).about(10).weight_version == str(version)
            checksums.add(done.checksum)
        asked = requests(4)
        assert answered_once(asked, engine.generate(asked, Sampling(max_tokens=4)))
    assert len(checksums) == 3
    assert not list((tmp_path / "weights").glob("*")), "the copy is not left behind"


def flip_one_bit(url, name, tensor):
    """Behind the engine's back: the same version, one bit of one weight another."""
    client, view = Client(url), allocate(tensor.numel() * 4).view(torch.float32).view(tensor.shape)
    view.copy_(tensor)
    view.view(torch.int32).view(-1)[7] ^= 1
    client.post("/begin_weight_update", 30)
    client.post("/update_weights_from_tensor", 30, serialized_named_tensors=[payload([(name, view)])], flush_cache=False)
    client.post("/end_weight_update", 30)


def test_a_single_bit_is_found(two_urls, dense, tmp_path):
    name, sent = "model.layers.1.self_attn.k_proj.weight", weights(dense)
    with engine_of(two_urls, dense, tmp_path) as engine:
        engine.load_weights(sent.items(), 6)
        first, second = engine.servers
        flip_one_bit(first.url, name, sent[name])
        engine._pool.take_out(first, "for the test")  # to come back it must have the weights
        asked = requests(4)
        deadline = 200
        while "checksums" not in first.cause and deadline:
            assert answered_once(asked, engine.generate(asked, Sampling(max_tokens=2)))
            deadline -= 1
        assert "checksums differ from those of the policy: model.layers.1.self_attn.qkv_proj.weight" in first.cause
        assert (first.state, second.state) == ("out", "ready")
        engine.load_weights(sent.items(), 7)  # a whole update makes it good
        assert (first.state, engine.last_update.servers) == ("ready", 2)


@pytest.mark.parametrize("way", ["tensor", "distributed"])
def test_an_update_that_is_cut_in_half(two_urls, dense, tmp_path, way):
    """The server has a part of it: it is out until a whole one. Where all are lost, the run ends with the cause."""
    path, asked = f"/update_weights_from_{way}", requests(6)
    proxy = Proxy(two_urls[0], lambda called, count, body: "cut after" if called == path and count == 2 else None)
    config = {"weight_update": way, "bucket_bytes": 2**16, "request_timeout": 10.0}
    with proxy.listening() as url, engine_of([url, two_urls[1]], dense, tmp_path, **config) as engine:
        if way == "distributed":  # one that leaves the process group ends the update of all
            with pytest.raises(RuntimeError, match=r"no SGLang server has taken the weights of version 8: "):
                engine.load_weights(weights(dense, 1.1).items(), 8)
        else:
            engine.load_weights(weights(dense, 1.1).items(), 8)
            assert engine.last_update.servers == 1
            assert "its weights are not known" in engine.servers[0].cause
            assert answered_once(asked, engine.generate(asked, Sampling(max_tokens=4)))
            assert engine.servers[0].state == "out"
        engine.load_weights(weights(dense, 1.2).items(), 9)
        assert engine.last_update.servers == 2
        rollouts = engine.generate(asked, Sampling(max_tokens=4))
    assert answered_once(asked, rollouts)
    assert {rollout.weight_version for rollout in rollouts} == {9}


def test_a_stream_that_fails_leaves_no_server_of_unknown_weights(two_urls, dense, tmp_path):
    drained = []

    def failing():
        yield from list(weights(dense).items())[:9]
        drained.append("failed")
        raise ArithmeticError("of the exporter")

    with engine_of(two_urls, dense, tmp_path, bucket_bytes=2**16) as engine:
        with pytest.raises(ArithmeticError, match="of the exporter"):
            engine.load_weights(failing(), 10)
        assert not engine._pool.ready()
        engine.load_weights(weights(dense).items(), 11)
        assert engine.last_update.servers == 2
        with pytest.raises(Refused, match="cannot load fp8 weights"):
            engine.load_weights(iter(drained), 12, fp8=True)
        engine.load_weights(weights(dense).items(), 13)


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_responses_on_their_way_through_an_update(two_urls, dense, tmp_path, mode):
    """Weights change while it generates: every request has one response, whole, marked with the oldest version in it."""
    asked, found = requests(6), []
    with engine_of(two_urls, dense, tmp_path, on_update=mode) as engine:
        engine.load_weights(weights(dense).items(), 20)
        sampling = Sampling(max_tokens=900)
        thread = threading.Thread(target=lambda: found.extend(engine.generate(asked, sampling)))
        thread.start()
        while sum(member.running for member in engine.servers) < len(asked):
            pass
        engine.load_weights(weights(dense, 1.1).items(), 21)
        thread.join()
        assert engine.last_update.servers == 2
        assert engine.discarded == 0
    assert answered_once(asked, found)
    assert {(rollout.finish_reason, len(rollout.response_ids)) for rollout in found} == {("length", 900)}
    assert {rollout.weight_version for rollout in found} <= {20, 21}
