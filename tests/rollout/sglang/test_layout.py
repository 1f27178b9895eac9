"""Without a server: hashes and layouts of tensor-parallel ranks, buckets, which urls.

Layouts of real servers with one rank, dense and MoE, are compared in test_weights.py and test_generate.py. The hash of GPUs: its
numbers here are of the server's own kernel, in Triton's interpreter.
"""

import json

import pytest
import torch

from megapsft.config import RolloutConfig
from megapsft.errors import Refused
from megapsft.rollout.sglang import SGLang
from megapsft.rollout.sglang.checksum import Expected, difference, hash_of_cuda, hashed
from megapsft.rollout.sglang.client import checked_url
from megapsft.rollout.sglang.server import Server
from megapsft.rollout.sglang.weights import ByMemory, buckets


def test_the_hash_of_gpus():
    assert hash_of_cuda(torch.arange(100003, dtype=torch.int32).view(torch.uint8)[:-1]) == 12558006189115629325
    assert hash_of_cuda(torch.tensor([1, 2, 3], dtype=torch.uint8)) == 8717714742718035935


def expected(folder, stream, tp):
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 2}
    (folder / "config.json").write_text(json.dumps(config))
    found = Expected(folder, torch.float32, tp, "cpu")
    for name, tensor in stream.items():
        found.add(name, tensor)
    return found.end()


def test_layouts_of_ranks(tmp_path):
    q, k, v = torch.randn(8, 4), torch.randn(4, 4), torch.randn(4, 4)
    gate, up, down, head = torch.randn(2, 6, 4), torch.randn(2, 6, 4), torch.randn(2, 4, 6), torch.randn(70, 4)
    layer = "model.layers.0"
    stream = {f"{layer}.self_attn.{name}_proj.weight": tensor for name, tensor in (("v", v), ("q", q), ("k", k))}
    for expert in range(2):
        for name, tensor in (("up", up), ("down", down), ("gate", gate)):
            stream[f"{layer}.mlp.experts.{expert}.{name}_proj.weight"] = tensor[expert]
    stream |= {f"{layer}.self_attn.o_proj.weight": q.T, "lm_head.weight": head, "model.norm.weight": head[:, 0]}
    padded = torch.cat([head, torch.zeros(58, 4)])
    for rank, found in enumerate(expected(tmp_path, stream, 2)):
        qkv = torch.cat([q[4 * rank : 4 * rank + 4], k[2 * rank : 2 * rank + 2], v[2 * rank : 2 * rank + 2]])
        part = slice(3 * rank, 3 * rank + 3)
        assert found == {
            f"{layer}.self_attn.qkv_proj.weight": hashed([qkv], False),
            f"{layer}.mlp.experts.w13_weight": hashed([torch.cat([gate[:, part], up[:, part]], 1)], False),
            f"{layer}.mlp.experts.w2_weight": hashed([down[:, :, part]], False),
            f"{layer}.self_attn.o_proj.weight": hashed([q.T[:, 4 * rank : 4 * rank + 4]], False),
            "lm_head.weight": hashed([padded[64 * rank : 64 * rank + 64]], False),
            "model.norm.weight": hashed([head[:, 0]], False),
        }
    four = expected(tmp_path, {name: stream[name] for name in stream if "self_attn" in name}, 4)
    for rank, found in enumerate(four):  # two heads of keys on four ranks
        qkv = torch.cat([q[2 * rank : 2 * rank + 2], *(heads[rank // 2 * 2 : rank // 2 * 2 + 2] for heads in (k, v))])
        assert found[f"{layer}.self_attn.qkv_proj.weight"] == hashed([qkv], False)
    assert difference(four, four) is None
    assert difference(four, [*four[:3], {**four[3], "other": "0"}]) == "other"
    del stream[f"{layer}.self_attn.k_proj.weight"]
    with pytest.raises(Refused, match=r"has only parts of model.layers.0.self_attn.qkv_proj.weight"):
        expected(tmp_path, stream, 2)


def test_fp8_is_hashed_as_what_it_stands_for(tmp_path):
    weight = torch.randn(130, 130).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.5, 2.0], [4.0, 8.0]])
    (found,) = expected(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale}, 1)
    spread = torch.full((130, 130), 0.5)
    spread[:128, 128:], spread[128:, :128], spread[128:, 128:] = 2, 4, 8
    assert found == {"a.weight": hashed([(weight.float() * spread).bfloat16()], False)}


def test_buckets_are_bounded_copies():
    stream = [(str(number), torch.full((number,), float(number), dtype=torch.bfloat16)) for number in (3, 40, 5, 1000, 0, 7)]
    sizes = []

    def allocate(least, most):
        assert least <= most
        sizes.append(most)
        return torch.empty(most, dtype=torch.uint8)

    found = list(buckets(iter(stream), 256, allocate))
    assert [[name for name, _ in bucket] for bucket in found] == [["3", "40", "5"], ["1000"], ["0", "7"]]
    assert sizes == [256, 2000, 256]
    for (_, sent), (_, copied) in zip(stream, [pair for bucket in found for pair in bucket], strict=True):
        assert torch.equal(sent, copied)
        assert sent.dtype == copied.dtype


def test_shared_memory_is_taken_for_what_comes_and_not_for_what_might():
    way, most, mib = ByMemory(1.0), 64 * 2**20, 2**20
    assert [way.allocate(1, most).numel() // mib for _ in range(5)] == [8, 16, 32, 64, 64]
    assert ByMemory(1.0).allocate(12 * mib, most).numel() == 12 * mib  # a large tensor comes first
    assert ByMemory(1.0).allocate(1, mib).numel() == mib  # rollout.bucket_bytes


@pytest.mark.parametrize("url", ["https://127.0.0.1:1", "127.0.0.1:1", "http://127.0.0.1:1/v1", "http://me@host:1", "file:///x"])
def test_which_urls(url):
    with pytest.raises(Refused, match=r"must be http://HOST:PORT"):
        checked_url(url)


def test_what_the_engine_refuses(tmp_path):
    config = RolloutConfig(engine="sglang", urls=("http://127.0.0.1:1", "http://192.0.2.1:1"))
    with pytest.raises(Refused, match=r"weight_update=tensor: goes through memory of this host.*use distributed"):
        SGLang(config, tmp_path, work=tmp_path, dtype="float32")
    with pytest.raises(Refused, match=r"server_args: --host=0.0.0.0: is set by the engine"):
        Server(
            python=tmp_path, model=tmp_path, dtype="float32", tp_size=1, port=0, arguments=("--host=0.0.0.0",), log=tmp_path
        )
    drained = iter([("a", None), ("b", None)])
    other = SGLang(config, tmp_path, work=tmp_path, dtype="float32", first=False)
    other.load_weights(drained, 1)
    other.close()
    assert list(drained) == []
    with pytest.raises(Refused, match=r"is for the first rank"):
        other.generate([], None)
