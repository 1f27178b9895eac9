"""Options of rollouts at the door. Not here: what the rewards refuse of their own (tests/rewards)."""

import sys

import pytest

from megapsft.config import load_config
from megapsft.errors import Refused
from megapsft.train import rollout_options
from megapsft.train.rollout_options import check_options
from tests.shipped import FOLDER


@pytest.fixture(autouse=True)
def an_interpreter_for_servers(monkeypatch):
    monkeypatch.setenv("MEGAPSFT_SGLANG_PYTHON", sys.executable)


REWARDS = "rewards=[{name: format}, {name: length, label: brief, soft_limit: 4}]"
PROMPTS = ["data.kind=prompts", REWARDS]
SGLANG = [*PROMPTS, "rollout.engine=sglang"]
HPT = [*PROMPTS, "objective.name=hpt", "rollout.demonstration_buffer=4"]
REPLAY = "model.moe_routing_replay=rollout"


@pytest.mark.parametrize(
    ("overrides", "refusal"),
    [
        (["rollout.n=4"], "rollout.n=4: is of sampled responses, and data.kind=demonstrations; use data.kind=prompts"),
        (["rollout.engine=sglang"], "rollout.engine=sglang: is of sampled responses"),
        ([REWARDS], "is of sampled responses"),
        (["log.rollouts=1"], "log.rollouts=1: is of sampled responses"),
        (["evaluate.data=[a.jsonl]", "rollout.n=4"], "rollout.n=4: is of sampled responses"),
        (["data.kind=prompts"], r"rewards=\[\]: names none"),
        (["data.kind=prompts", "rewards=[{name: nothing}]"], "'nothing': is not known"),
        ([*PROMPTS, "rollout.urls=[http://127.0.0.1:1]"], "is of SGLang servers, and rollout.engine=inprocess has none"),
        ([*PROMPTS, "rollout.weight_update=disk"], "rollout.weight_update=disk: is of SGLang servers"),
        ([*PROMPTS, "rollout.max_weight_lag=1"], "rollout.max_weight_lag=1: needs an engine that samples while"),
        ([*PROMPTS, "rollout.oversample=1.5"], "rollout.oversample=1.5: needs an engine"),
        ([*PROMPTS, "rollout.top_p=1.5"], "top_p=1.5: must be above 0 and at most 1"),
        ([*PROMPTS, "rollout.top_k=0"], "top_k=0: must be 1 or more, or -1"),
        (["evaluate.data=[a.jsonl]", "evaluate.top_p=2"], "top_p=2.0: must be above 0"),
        ([*SGLANG, "rollout.python=/nowhere/python"], "nowhere/python"),
        ([*SGLANG, "rollout.oversample=0.5"], "rollout.oversample=0.5: must be 1 or more"),
        ([*SGLANG, "rollout.max_batch_size=8"], "rollout.max_batch_size=8: is of rollout.engine=inprocess"),
        ([*SGLANG, "rollout.urls=[http://127.0.0.1:1]", "rollout.servers=2"], "rollout.servers=2: is of servers"),
        ([*PROMPTS, "rollout.dynamic_sampling=length"], "=length: is not a reward; there are: format, brief"),
        ([*PROMPTS, "rollout.max_rounds=2"], "rollout.max_rounds=2: is of dynamic sampling, which is off"),
        ([REPLAY], "=rollout: chooses the experts that SGLang chose as it sampled, and data.kind=demonstrations: nothing"),
        ([*PROMPTS, REPLAY], "=rollout: chooses the experts .* and rollout.engine=inprocess; use rollout.engine=sglang"),
        ([*PROMPTS, "rollout.demonstration_buffer=4"], "demonstration_buffer=4: is of objectives .* objective.name=psft; use"),
        ([*HPT, "objective.gate=null"], "demonstration_buffer=4: is of objectives .* objective.name=hpt, gate=null; use"),
        ([*HPT, "data.select=rft"], "demonstration_buffer=4: is of objectives .* data.select=rft; use"),
        (["rollout.demonstration_buffer=4"], "rollout.demonstration_buffer=4: is of sampled responses"),
        ([*PROMPTS, "rollout.fp8=true"], "rollout.fp8=True: is of SGLang servers"),
        (["rollout.fp8=true"], "rollout.fp8=True: is of sampled responses"),
        ([*SGLANG, "rollout.fp8=true", "model.dtype=float32"], "rollout.fp8=true: is of bfloat16 weights, and model.dtype"),
    ],
)
def test_what_is_refused(overrides, refusal):
    with pytest.raises(Refused, match=refusal):
        check_options(load_config(None, overrides))


@pytest.mark.parametrize("more", [[], ["rollout.urls=[http://127.0.0.1:1]"]])
def test_servers_are_refused_for_a_model_that_they_are_not_given(more):
    model = FOLDER / "models/Qwen2.5-VL-7B-Instruct"
    with pytest.raises(Refused, match="rollout.engine=sglang: is not for Qwen2_5_VLForCond.*torchvision; use the engine"):
        check_options(load_config(None, [*SGLANG, f"model.path={model}", *more]))
    check_options(load_config(None, [*PROMPTS, f"model.path={model}"]))


def test_fp8_without_a_gpu_is_refused_and_with_one_is_not(monkeypatch):
    config = load_config(None, [*SGLANG, "rollout.fp8=true"])
    monkeypatch.setattr(rollout_options, "has_cuda", lambda: False)
    with pytest.raises(Refused, match="rollout.fp8=true: needs a GPU, and there is none: .*; leave it out, or train where"):
        check_options(config)
    monkeypatch.setattr(rollout_options, "has_cuda", lambda: True)
    check_options(config)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        PROMPTS,
        [*SGLANG, "rollout.oversample=1.5", "rollout.max_weight_lag=2", "rollout.servers=2"],
        [*SGLANG, REPLAY],
        [*PROMPTS, "rollout.dynamic_sampling=brief", "rollout.max_rounds=2"],
        ["evaluate.data=[a.jsonl]", "rollout.engine=sglang", "rollout.servers=2"],
    ],
)
def test_what_is_not(overrides):
    check_options(load_config(None, overrides))
