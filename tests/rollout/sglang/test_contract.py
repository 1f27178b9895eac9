"""What holds of every engine: the policy in process, the SGLang server, and what either of them said, recorded.

Not here: what only one of them does (tests/policy/test_generate.py, test_generate.py, ../test_recorded.py).
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megapsft.policy.generate import InProcess
from megapsft.rollout.base import Request, Rollout, Sampling
from megapsft.rollout.recorded import Recorded
from tests.policy.test_generate import build
from tests.ranks import run_ranks
from tests.rollout.sglang.servers import engine_of

pytestmark = pytest.mark.servers

STOPS = tuple(range(0, 307, 9))
SAMPLING = Sampling(temperature=0.8, max_tokens=16, stop_token_ids=STOPS, seed=5)
PROMPTS = ((5, 6, 7), (8,), tuple(range(40, 60)))
REQUESTS = [Request(prompt_ids=prompt, number=number) for prompt in PROMPTS for number in range(4)]


def sampled(engine) -> dict:
    """What one engine says; then with other weights, or at least another version."""
    first = engine.generate(REQUESTS, SAMPLING)
    begun = [Request(prompt_ids=r.prompt_ids, number=n, partial=begun_of(r)) for n, r in enumerate(first[:4])]
    return {
        "nothing": engine.generate([], SAMPLING),
        "first": first,
        "reversed": engine.generate(REQUESTS[::-1], SAMPLING),
        "gone on with": engine.generate(begun, SAMPLING),
        "begun": begun,
    }


def begun_of(rollout: Rollout) -> Rollout:
    """Its first token, as if it had been aborted there; None where it was not longer."""
    if len(rollout.response_ids) < 2:
        return None
    return Rollout(
        prompt_ids=rollout.prompt_ids,
        response_ids=rollout.response_ids[:1],
        rollout_logprobs=rollout.rollout_logprobs[:1],
        finish_reason="abort",
        weight_version=rollout.weight_version,
    )


def in_process(model) -> dict:
    policy = build(model)
    engine = InProcess(policy, max_batch_size=5)
    engine.load_weights(iter(()), 3)
    return sampled(engine)


def record(rollouts: list[Rollout], path) -> None:
    rows = []
    for request, rollout in zip(REQUESTS, rollouts, strict=True):
        said = {
            "token_ids": list(rollout.response_ids),
            "logprobs": list(rollout.rollout_logprobs),
            "finish_reason": rollout.finish_reason,
            "weight_version": rollout.weight_version,
        }
        rows.append({"prompt_token_ids": list(request.prompt_ids), "number": request.number, "rollouts": [said]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def found(dense, two_urls, tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("contract")
    (ours,) = run_ranks(1, in_process, dense)
    with engine_of(two_urls, dense, folder / "work") as engine:
        engine.load_weights(load_file(dense / "model.safetensors").items(), 3)
        theirs = sampled(engine)
    record(ours["first"], folder / "recorded.jsonl")
    return {"inprocess": ours, "sglang": theirs, "recorded": sampled(Recorded(folder / "recorded.jsonl"))}


@pytest.fixture(scope="module")
def model(dense):
    return AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()


@pytest.mark.parametrize("engine", ["inprocess", "sglang", "recorded"])
def test_the_contract(engine, found, model):
    said = found[engine]
    assert said["nothing"] == []
    for asked, rollouts in ((REQUESTS, said["first"]), (REQUESTS[::-1], said["reversed"]), (said["begun"], said["gone on with"])):
        assert [rollout.prompt_ids for rollout in rollouts] == [request.prompt_ids for request in asked]
        for request, rollout in zip(asked, rollouts, strict=True):
            assert rollout.weight_version == 3
            assert 1 <= len(rollout.response_ids) == len(rollout.rollout_logprobs) <= SAMPLING.max_tokens
            ended = [token in STOPS for token in rollout.response_ids]
            assert not any(ended[:-1])  # a stop token is the last
            assert rollout.finish_reason == ("stop" if ended[-1] else "length")
            assert rollout.finish_reason == "stop" or len(rollout.response_ids) == SAMPLING.max_tokens
            if request.partial is not None:
                assert rollout.response_ids[:1] == request.partial.response_ids
            expected = teacher_forced(model, rollout)
            assert rollout.rollout_logprobs == pytest.approx(expected, abs=1e-4)
            assert all(math.isfinite(value) and value <= 1e-6 for value in rollout.rollout_logprobs)
    assert any(rollout.finish_reason == "stop" for rollout in said["first"])
    assert len({rollout.response_ids for rollout in said["first"]}) > len(PROMPTS)  # numbers have draws of their own


@torch.no_grad()
def teacher_forced(model, rollout: Rollout) -> list[float]:
    """Of each response token: the log-probability under the temperature, by transformers."""
    ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
    every = (model(ids).logits[0, :-1] / SAMPLING.temperature).log_softmax(-1)
    return every.gather(1, ids[0, 1:, None])[len(rollout.prompt_ids) - 1 :, 0].tolist()


def test_a_seed_is_a_response(found):
    """Where the engine can: the request says it, not its place."""
    for engine in ("inprocess", "recorded"):
        first = [rollout.response_ids for rollout in found[engine]["first"]]
        assert [rollout.response_ids for rollout in found[engine]["reversed"]][::-1] == first
        assert [rollout.response_ids for rollout in found[engine]["gone on with"]] == first[:4]
