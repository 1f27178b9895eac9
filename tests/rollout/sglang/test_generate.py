"""What a real server samples, beside `transformers`: ids, log-probabilities, ends, versions, experts."""

import json
import shutil
import tempfile

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from megapsft.rollout.base import Request, Sampling
from tests.rollout.sglang.servers import Proxy, answered_once, engine_of, requests, weights

pytestmark = pytest.mark.servers

TOLERANCE = 2e-5  # fp32 on both sides, sums in another order


def logprobs(model, rollout, temperature, **options):
    """Of each response token, by one forward pass of the whole sequence; and the model's other outputs."""
    ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
    with torch.no_grad():
        output = model(ids, **options)
    every = (output.logits[0, :-1].float() / temperature).log_softmax(-1)
    return every.gather(1, ids[0, 1:, None])[len(rollout.prompt_ids) - 1 :, 0], output


def close(rollout, expected):
    torch.testing.assert_close(torch.tensor(rollout.rollout_logprobs), expected, atol=TOLERANCE, rtol=0)


def with_weights(model, scale):
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(model / "config.json", folder)
        save_file(weights(model, scale), f"{folder}/model.safetensors", metadata={"format": "pt"})
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_logprobs_are_of_the_scaled_logits_before_the_cuts(two_urls, dense, tmp_path):
    model, asked = with_weights(dense, 1.5), requests(6)
    sampling = Sampling(temperature=0.7, top_p=0.8, top_k=50, max_tokens=24)
    with engine_of(two_urls, dense, tmp_path) as engine:
        engine.load_weights(weights(dense, 1.5).items(), 1)
        rollouts = engine.generate(asked, sampling)
        greedy = engine.generate(asked[:2], Sampling(temperature=0, max_tokens=8))
    assert answered_once(asked, rollouts)
    for rollout in rollouts:
        assert (rollout.finish_reason, len(rollout.response_ids), rollout.weight_version) == ("length", 24, 1)
        close(rollout, logprobs(model, rollout, 0.7)[0])
    for rollout in greedy:
        expected, output = logprobs(model, rollout, 1.0)
        close(rollout, expected)
        begin = len(rollout.prompt_ids) - 1
        assert rollout.response_ids == tuple(output.logits[0, begin:-1].argmax(-1).tolist())


def test_ends_are_those_of_the_sampling_alone(two_urls, dense, tmp_path):
    """The model's own end of text, which the server would stop at, is none here; a stop token is the response's last."""
    ends = json.loads((dense / "generation_config.json").read_text())["eos_token_id"]
    end = ends if isinstance(ends, int) else ends[0]
    changed = weights(dense)
    changed["lm_head.weight"][end] = 0  # logit 0 among others of a few hundredths: it is drawn now and then
    with engine_of(two_urls, dense, tmp_path) as engine:
        engine.load_weights(changed.items(), 2)
        without = engine.generate(requests(32), Sampling(max_tokens=200))
        stopped = engine.generate(requests(32), Sampling(max_tokens=200, stop_token_ids=(end,)))
    assert any(end in rollout.response_ids for rollout in without)
    assert {(rollout.finish_reason, len(rollout.response_ids)) for rollout in without} == {("length", 200)}
    assert all(len(rollout.rollout_logprobs) == 200 for rollout in without)
    assert any(rollout.finish_reason == "stop" for rollout in stopped)
    for rollout in stopped:
        assert (rollout.finish_reason == "stop") == (rollout.response_ids[-1] == end)
        assert end not in rollout.response_ids[:-1]


def test_the_rest_is_aborted_when_there_is_enough_and_is_gone_on_with(two_urls, dense, tmp_path):
    model, asked, seen = with_weights(dense, 1.2), [*requests(3), *requests(3, 7)], []

    def enough(index, rollout):
        seen.append((index, rollout))
        return len(seen) == 2

    with engine_of(two_urls, dense, tmp_path) as engine:
        engine.load_weights(weights(dense, 1.2).items(), 3)
        rare = Sampling(max_tokens=1500, stop_token_ids=(0,))  # on average after 300 tokens
        rollouts = engine.generate(asked, rare, enough)
        assert answered_once(asked, rollouts)
        assert all(rollouts[index] is rollout for index, rollout in seen)
        partial = [rollout for rollout in rollouts if rollout.finish_reason == "abort"]
        assert partial
        engine.load_weights(weights(dense, 1.2).items(), 4)
        more = Sampling(max_tokens=max(len(rollout.response_ids) for rollout in partial) + 10)
        finished = engine.generate([Request(prompt_ids=p.prompt_ids, partial=p) for p in partial], more)
    for begun, rollout in zip(partial, finished, strict=True):
        assert rollout.response_ids[: len(begun.response_ids)] == begun.response_ids
        assert (rollout.finish_reason, len(rollout.response_ids)) == ("length", more.max_tokens)
        assert rollout.weight_version == (3 if begun.response_ids else 4)  # the oldest
        close(rollout, logprobs(model, rollout, 1.0)[0])


def test_a_rollout_of_other_weights_is_thrown_away_and_asked_for_again(two_urls, dense, tmp_path):
    asked = requests(6)
    older = {"weight_version": "4", "weight_versions": [{"version": "4", "start": 0, "end": 5}]}
    proxy = Proxy(two_urls[0], lambda path, count, body: older if path == "/generate" and count == 1 else None)
    with proxy.listening() as url, engine_of([url, two_urls[1]], dense, tmp_path) as engine:
        engine.load_weights(weights(dense).items(), 4)
        engine.load_weights(weights(dense).items(), 5)
        rollouts = engine.generate(asked, Sampling(max_tokens=5))
        assert answered_once(asked, rollouts)
        assert {rollout.weight_version for rollout in rollouts} == {5}
        assert engine.discarded == 1
        assert engine.retried >= 1


def test_mixture_of_experts_its_updates_and_its_routing(moe, tmp_path):
    """One server of its own: three updates, each another way, and after each what it samples is of the new weights."""
    arguments = ("--enable-return-routed-experts", "--log-level-http", "info")
    with engine_of([], moe, tmp_path, server_args=arguments, max_restarts=0) as engine:
        asked = engine.servers[0].process.log.read_text()
        assert '"POST /freeze_gc HTTP/1.1" 200' in asked  # or every flush of its cache looks through all that it has imported
        for version, way in enumerate(("tensor", "disk", "distributed"), 1):
            object.__setattr__(engine._config, "weight_update", way)
            engine.load_weights(weights(moe, 1 + version / 4).items(), version)
            model = with_weights(moe, 1 + version / 4)
            for rollout in engine.generate(requests(3), Sampling(max_tokens=12)):
                assert rollout.weight_version == version
                expected, output = logprobs(model, rollout, 1.0, output_router_logits=True)
                close(rollout, expected)
                chosen = torch.stack([layer.topk(2, -1).indices.sort(-1).values for layer in output.router_logits], 1)
                routed = torch.tensor(rollout.routed_experts).sort(-1).values
                assert rollout.routed_experts.shape == (4 + 12 - 1, 2, 2)
                assert torch.equal(routed.long(), chosen[:-1])
