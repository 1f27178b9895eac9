"""What an engine outside of the process is given: weights in FP8 as the converter writes them, and what its servers start with.

That real servers take weights is tested in tests/rollout/sglang; FP8 needs servers on GPUs.
"""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch

from megapsft.checkpoint.convert.hf_to_megatron import hf_to_megatron
from megapsft.checkpoint.convert.megatron_to_hf import megatron_to_hf
from megapsft.checkpoint.hf import read_config
from megapsft.checkpoint.weights import rows_of
from megapsft.checkpoint.weights.fp8 import FP8, SCALE
from megapsft.checkpoint.weights.hf import HFWeights
from megapsft.config import load_config
from megapsft.errors import Refused
from megapsft.parallel import initialize, shutdown
from megapsft.train.build import build_policy
from megapsft.train.engines import Live, fp8_folder, open_engine, server_options
from megapsft.train.plan import plan_run
from tests.ranks import run_ranks

TP2 = "parallel.tensor_model_parallel_size=2"


class Engine:
    """Keeps what it is given."""

    def load_weights(self, stream, version, *, fp8):
        assert fp8
        self.version, self.given = version, list(stream)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_weights_in_fp8_are_the_bytes_of_the_converter(family, tiny_models, tiny_data, tmp_path):
    model = tiny_models(family)
    hf_to_megatron(model, tmp_path / "megatron", dtype="bf16")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "fp8", fp8_blockwise=True)
    written = HFWeights(tmp_path / "fp8", direct=False)
    (version, given, config, block), other = run_ranks(2, update, model, tiny_data, tmp_path / "folder")
    assert other is None
    assert version == 3
    assert {name for name, *_ in given} == written.tensors.keys()
    assert len(given) == len(written.tensors)
    for name, dtype, raw in given:
        expected = rows_of(written, name)
        assert dtype == expected.dtype
        assert raw.numpy().tobytes() == expected.view(torch.uint8).numpy().tobytes(), name
    names = [name for name, *_ in given]
    quantised = [name for name, dtype, _ in given if dtype == FP8]
    assert all(names[names.index(name) + 1] == name + SCALE for name in quantised), "a server needs both to take one"
    assert len(quantised) == (4 * 7 if family == "qwen3" else 4 * (4 + 3 * 8))
    assert config["quantization_config"] == json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"]
    assert block == (128, 128)


def test_weights_that_cannot_be_quantised_end_the_update_on_every_rank(tiny_models, tiny_data):
    for error in run_ranks(2, spoilt, tiny_models("qwen3"), tiny_data):
        assert "layers.1.mlp.down_proj.weight" in error
        assert "infinite or not a number" in error


def started(model, data):
    config = load_config(None, [f"model.path={model}", f"data.path={data}", "data.columns.prompt=question",
                                "data.columns.demonstration=answer", TP2])  # fmt: skip
    plan = plan_run(config, int(os.environ["WORLD_SIZE"]))
    initialize(plan.mesh, config.parallel, seed=1)
    return build_policy(plan)


def update(model, data, folder):
    """On a rank: what the engine is given by the first, and the folder that servers start from."""
    policy, engine = started(model, data), Engine()
    Live(engine, False, policy, fp8=True).update(3)
    result = None
    if os.environ["RANK"] == "0":
        given = [(name, tensor.dtype, tensor.contiguous().view(torch.uint8)) for name, tensor in engine.given]
        fp8_folder(policy, folder)
        result = engine.version, given, json.loads((folder / "config.json").read_text()), read_config(folder).fp8_block
    shutdown()
    return result


def spoilt(model, data):
    policy = started(model, data)
    policy.gpt_models()[0].decoder.layers[1].mlp.linear_fc2.weight.data[0, 0] = torch.inf
    with pytest.raises(Refused) as refused:
        Live(Engine(), False, policy, fp8=True).update(1)
    shutdown()
    return str(refused.value)


def test_servers_start_with_what_other_options_need():
    def arguments(*overrides):
        return server_options(load_config(None, ["rollout.engine=sglang", *overrides])).server_args

    routing, ours = "--enable-return-routed-experts", "rollout.server_args=[--max-total-tokens, '64']"
    replay = "model.moe_routing_replay=rollout"
    assert arguments(ours, "model.moe_routing_replay=true") == ("--max-total-tokens", "64")
    assert arguments(ours, replay) == ("--max-total-tokens", "64", routing)
    assert arguments(replay, f"rollout.server_args=[{routing}]") == (routing,)
    assert arguments("rollout.fp8=true") == ("--load-format", "dummy")
    assert arguments("rollout.fp8=true", replay, "rollout.urls=[http://127.0.0.1:1]") == ()


@pytest.mark.parametrize("replay", ["true", "rollout"])
def test_a_server_that_returns_no_routing_is_refused_where_it_is_replayed(replay, tmp_path, monkeypatch):
    closed = []

    class Silent:
        def __init__(self, options, model, *, work, dtype):
            self.servers = [SimpleNamespace(url="http://127.0.0.1:1", routed_experts=False)]

        def close(self):
            closed.append(self)

    monkeypatch.setattr("megapsft.rollout.sglang.engine.SGLang", Silent)
    options = ["rollout.engine=sglang", "rollout.urls=[http://127.0.0.1:1]", f"run.dir={tmp_path}"]
    plan = SimpleNamespace(config=load_config(None, [*options, f"model.moe_routing_replay={replay}"]))
    if replay == "true":
        assert open_engine(plan, SimpleNamespace(source=tmp_path)).engine.servers
        return
    with pytest.raises(Refused, match="http://127.0.0.1:1 does not; start it with --enable-return-routed-experts"):
        open_engine(plan, SimpleNamespace(source=tmp_path))
    assert len(closed) == 1
