"""The in-process engine on real ranks: transformers' greedy tokens, the policy's log-probabilities, one result for all splits.

That a cache of keys and values changes nothing is seen in the log-probabilities: the policy's forward pass has no cache. Drawing
is in test_draw.py. Not tested here: Transformer Engine's attention (tests/gpu).
"""

import dataclasses

import numpy as np
import pytest
import torch
import transformers

from megapsft.checkpoint.hf import import_hf, read_config
from megapsft.config import ModelConfig, ParallelConfig
from megapsft.errors import Refused
from megapsft.models.families import family_of
from megapsft.parallel import initialize, plan_mesh, shutdown
from megapsft.policy.build import Policy, build_chunks, distribute, model_shape, transformer_config
from megapsft.policy.forward import evaluate, forward_backward, read
from megapsft.policy.generate import InProcess
from megapsft.rollout.base import Request, Rollout, Sampling
from megapsft.types import Microbatch, Minibatch
from tests.policy.test_families import EP2, MODELS, PP2, TP2, VOCAB, make
from tests.ranks import run_ranks

PROMPTS = ((5,), (7, 3, 9), tuple(range(20, 37)), (5, 5), (130, 0, 64, 2, 2, 2, 11))
REQUESTS = [Request(prompt_ids=prompt, number=number) for prompt in PROMPTS[:2] for number in range(3)] + [
    Request(prompt_ids=prompt) for prompt in PROMPTS[2:]
]
GREEDY = Sampling(temperature=0.0, max_tokens=12)
SAMPLED = Sampling(temperature=0.8, top_p=0.95, top_k=100, max_tokens=12, stop_token_ids=tuple(range(0, VOCAB, 11)), seed=3)
FREE = Sampling(max_tokens=9, seed=4)

VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
LAYOUTS = [
    ("qwen3-tied", 2, TP2),
    ("qwen3-tied", 2, VPP2),
    ("qwen3-tied", 2, {}),  # two replicas
    ("qwen3-tied", 2, {"context_parallel_size": 2}),
    ("qwen3-tied", 4, {**TP2, **PP2}),
    ("qwen3-moe", 2, TP2),
    ("qwen3-moe", 2, PP2),
    ("qwen3-moe", 2, EP2),
    ("qwen3-moe", 4, {**TP2, **PP2, **EP2}),
]


def build(folder, world_size=1, split=None, dtype="float32") -> Policy:
    """The policy of `folder` on this rank, wrapped as for training."""
    parallel, model = ParallelConfig(**(split or {})), ModelConfig(dtype=dtype)
    hf = read_config(folder)
    family = family_of(hf)
    mesh = plan_mesh(parallel, world_size, model_shape(hf), torch.cuda.is_available(), model.moe_token_dispatcher_type)
    initialize(mesh, parallel, seed=1)
    config = transformer_config(family, hf, model, parallel, mesh)
    chunks = distribute(build_chunks(config, hf, model, mesh), config, parallel)
    import_hf(chunks, folder, hf)
    return Policy(chunks=chunks, config=config, family=family, hf=hf, source=folder, mesh=mesh)


def minibatch(rollouts) -> Minibatch:
    """Their prompts and responses, a row each."""
    rows = [rollout.prompt_ids + rollout.response_ids for rollout in rollouts]
    shape = len(rows), max(map(len, rows))
    token_ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    for index, (row, rollout) in enumerate(zip(rows, rollouts, strict=True)):
        token_ids[index, : len(row)] = torch.tensor(row)
        mask[index, len(rollout.prompt_ids) - 1 : len(row) - 1] = True
    microbatch = Microbatch(
        token_ids=token_ids, labels=token_ids.roll(-1, 1), position_ids=torch.arange(shape[1]).expand(shape), loss_mask=mask,
        loss_weights=mask / mask.sum(), sample_ids=torch.arange(len(rows))[:, None].expand(shape), cu_seqlens=None,
        max_seqlen=shape[1], samples=len(rows), demonstration=mask, rewards=torch.zeros(shape), advantages=torch.zeros(shape),
    )  # fmt: skip
    tokens = int(mask.sum())
    return Minibatch(
        microbatches=(microbatch,), trained_tokens=tokens, forward_tokens=mask.numel(), real_tokens=tokens,
        squared_lengths=sum(len(row) ** 2 for row in rows), samples=len(rows),
    )  # fmt: skip


def teacher_forced(policy, rollouts, temperature) -> list[float]:
    """The policy's own log-probabilities of all response tokens, end to end."""
    batch = minibatch(rollouts)
    (output,) = evaluate(dataclasses.replace(policy, temperature=temperature), batch)
    return read(output).logprobs[batch.microbatches[0].loss_mask].tolist()


def gradients(policy, rollouts) -> list[np.ndarray]:
    def consume(output, microbatch):
        loss = -torch.where(microbatch.loss_mask, read(output).logprobs, 0) * microbatch.loss_weights
        return loss.sum(), loss.sum().item()

    reports = forward_backward(policy, minibatch(rollouts), consume)
    grads = [parameter.main_grad.clone().numpy() for chunk in policy.chunks for parameter in chunk.parameters()]
    return [np.array(reports), *grads]


# what runs on the ranks


def alone(folder) -> dict:
    """Everything that one rank can tell of a model."""
    policy, told = build(folder), {}
    engine = InProcess(policy)
    told["greedy"], told["sampled"] = (engine.generate(REQUESTS, sampling) for sampling in (GREEDY, SAMPLED))
    told["free"] = engine.generate(REQUESTS, FREE)
    for name, sampling in (("greedy", GREEDY), ("sampled", SAMPLED)):
        told[f"{name} forward"] = teacher_forced(policy, told[name], sampling.temperature or 1.0)
    narrow = InProcess(policy, max_batch_size=2, max_prefill_tokens=8)
    told["narrow"] = narrow.generate(REQUESTS, SAMPLED)
    told["backwards"] = InProcess(policy, max_batch_size=5).generate(REQUESTS[::-1], SAMPLED)[::-1]
    told["one by one"] = [engine.generate([request], SAMPLED)[0] for request in REQUESTS]
    shutdown()
    return told


def everywhere(folder, world_size, split):
    policy = build(folder, world_size, split)
    engine = InProcess(policy, max_batch_size=3)  # less than the requests: some wait
    told = [engine.generate(REQUESTS, sampling) for sampling in (GREEDY, SAMPLED)]
    told += [engine.generate(REQUESTS[:1], FREE), engine.generate([], FREE)]  # fewer requests than ranks
    shutdown()
    return told


def in_bfloat16(folder):
    policy = build(folder, 2, PP2, "bfloat16")
    rollouts = InProcess(policy).generate(REQUESTS, GREEDY)
    shutdown()
    return rollouts


def details(folder, base) -> dict:
    """What is asked of one model only; `base` are its rollouts of REQUESTS, SAMPLED."""
    policy, told = build(folder), {}
    engine = InProcess(policy, max_batch_size=4)
    engine.load_weights(iter_of_nothing(), 7)
    engine.close()
    told["version"] = {rollout.weight_version for rollout in engine.generate(REQUESTS, SAMPLED)}
    lengths = [len(rollout.response_ids) - 1 for rollout in base]
    told["cuts"] = [0, *(min(cut, length) for cut, length in zip((1, 2, 3, 4, 0, 2), lengths[1:], strict=False)), None, None]
    told["continued"] = engine.generate([go_on(*args) for args in zip(REQUESTS, base, told["cuts"], strict=True)], SAMPLED)
    third = engine.generate(REQUESTS, FREE)[0].response_ids[2]
    stops = dataclasses.replace(FREE, stop_token_ids=(third, VOCAB - 1))
    told["stops"], told["stopped"] = stops.stop_token_ids, engine.generate(REQUESTS, stops)
    told["one token"] = engine.generate(REQUESTS, dataclasses.replace(FREE, max_tokens=1))
    told["other seed"] = engine.generate(REQUESTS, dataclasses.replace(SAMPLED, seed=5))
    told["again"] = engine.generate([REQUESTS[1], REQUESTS[1]], SAMPLED)
    told["passed"] = counted(policy)
    told["refusals"] = refusals(engine)
    shutdown()
    return told


def iter_of_nothing():
    raise AssertionError("the stream was read")
    yield


def go_on(request, rollout, cut):
    if cut is None:
        return request
    partial = dataclasses.replace(
        rollout, response_ids=rollout.response_ids[:cut], rollout_logprobs=rollout.rollout_logprobs[:cut],
        finish_reason="abort", weight_version=4,
    )  # fmt: skip
    return dataclasses.replace(request, partial=partial)


def counted(policy):
    """Tokens that go through the model for five responses to a prompt of 17, two at a time; and of the responses."""
    passed, head = [], policy.chunks[0]
    handle = head.register_forward_pre_hook(lambda module, args: passed.append(args[0].numel()))
    rollouts = InProcess(policy, max_batch_size=2).generate([Request(prompt_ids=PROMPTS[2], number=n) for n in range(5)], FREE)
    handle.remove()
    return sum(passed), sum(len(rollout.response_ids) for rollout in rollouts)


def refusals(engine) -> list[str]:
    done = Rollout(prompt_ids=(5,), response_ids=(1, 2), rollout_logprobs=(-1.0, -1.0), finish_reason="stop", weight_version=0)
    aborted = dataclasses.replace(done, finish_reason="abort")
    attempts = [
        (Request(prompt_ids=()), FREE, None),
        (Request(prompt_ids=(1,) * 120), FREE, None),
        (Request(prompt_ids=(1, VOCAB)), FREE, None),
        (Request(prompt_ids=(1, 2.0)), FREE, None),
        (Request(prompt_ids=(1,)), Sampling(max_tokens=1, stop_token_ids=(VOCAB,)), None),
        (Request(prompt_ids=(5,), partial=done), FREE, None),
        (Request(prompt_ids=(6,), partial=aborted), FREE, None),
        (Request(prompt_ids=(5,), partial=aborted), Sampling(max_tokens=2), None),
        (Request(prompt_ids=(5,)), FREE, lambda index, rollout: True),
    ]
    messages = []
    for request, sampling, enough in attempts:
        try:
            engine.generate([REQUESTS[0], request], sampling, enough)
        except Refused as refusal:
            messages.append(str(refusal))
    for options in ({"max_batch_size": 0}, {"max_prefill_tokens": 0}):
        try:
            InProcess(engine.policy, **options)
        except Refused as refusal:
            messages.append(str(refusal))
    return messages


def between_updates(folder, rollouts):
    """Gradients before, after a generate, and after one that failed half-way; what differs in the modules."""
    policy = build(folder)
    engine = InProcess(policy)
    told, modules = [gradients(policy, rollouts)], [state(policy)]
    policy.chunks[0].module.decoder.layers[1].eval()  # only a part of it trains
    modules.append(state(policy))
    engine.generate(REQUESTS, SAMPLED)
    modules.append(state(policy))
    told.append(gradients(policy, rollouts))
    broken = policy.chunks[0].module.decoder.layers[2].mlp.register_forward_pre_hook(fails)
    failed = False
    try:
        engine.generate(REQUESTS, GREEDY)
    except ZeroDivisionError:
        failed = True
    broken.remove()
    modules.append(state(policy))
    told.append(gradients(policy, rollouts))
    shutdown()
    return told, modules, failed


def fails(module, args):
    if args[0].shape[0] == len(REQUESTS):  # not the prompts, but the tokens behind
        raise ZeroDivisionError


def state(policy):
    modules = [(name, module) for chunk in policy.chunks for name, module in chunk.named_modules()]
    request = policy.head().request
    return [(name, module.training, "forward" in vars(module)) for name, module in modules], request == "hidden"


# what is expected of it


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> (folder, what one rank tells of it)."""
    root, told = tmp_path_factory.mktemp("models"), {}

    def of(name):
        if name not in told:
            make(name, root / name)
            told[name] = root / name, run_ranks(1, alone, root / name)[0]
        return told[name]

    return of


def same(rollouts, expected):
    """The same tokens for the same reasons, log-probabilities within 1e-5."""
    assert len(rollouts) == len(expected)
    for rollout, other in zip(rollouts, expected, strict=True):
        assert dataclasses.replace(rollout, rollout_logprobs=()) == dataclasses.replace(other, rollout_logprobs=())
        np.testing.assert_allclose(rollout.rollout_logprobs, other.rollout_logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_that_of_transformers_and_logprobs_are_the_policys(name, models):
    folder, told = models(name)
    kind = transformers.AutoModelForImageTextToText if "-vl" in name else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, attn_implementation="eager").eval()
    for request, rollout in zip(REQUESTS, told["greedy"], strict=True):
        prompt = torch.tensor([request.prompt_ids])
        seen = torch.ones_like(prompt)  # else the padding token would be masked in the prompt, too
        options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        whole = model.generate(prompt, attention_mask=seen, **options)
        assert rollout.prompt_ids == request.prompt_ids
        assert rollout.response_ids == tuple(whole[0, prompt.shape[1] :].tolist())
        assert rollout.finish_reason == "length"
    for kind in ("greedy", "sampled"):
        logprobs = [logprob for rollout in told[kind] for logprob in rollout.rollout_logprobs]
        np.testing.assert_allclose(logprobs, told[f"{kind} forward"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["qwen3-tied", "qwen3-moe"])
@pytest.mark.parametrize("batch", ["narrow", "backwards", "one by one"])
def test_other_requests_change_nothing(name, batch, models):
    told = models(name)[1]
    same(told[batch], told["sampled"])
    assert {rollout.finish_reason for rollout in told["sampled"]} == {"stop", "length"}


@pytest.mark.parametrize(("name", "world_size", "split"), LAYOUTS, ids=lambda value: str(value))
def test_no_split_changes_anything(name, world_size, split, models):
    folder, told = models(name)
    for greedy, sampled, one, none in run_ranks(world_size, everywhere, folder, world_size, split):
        same(greedy, told["greedy"])
        same(sampled, told["sampled"])
        same(one, told["free"][:1])
        assert none == []


def test_bfloat16_over_a_pipeline(models):
    folder, told = models("qwen3-tied")
    first, second = run_ranks(2, in_bfloat16, folder)
    assert first == second
    for rollout, exact in zip(first, told["greedy"], strict=True):
        assert rollout.rollout_logprobs[0] == pytest.approx(exact.rollout_logprobs[0], abs=0.1)


def test_details(models):
    folder, told = models("qwen3-tied")
    base, free = told["sampled"], told["free"]
    detail = run_ranks(1, details, folder, base)[0]

    assert detail["version"] == {7}
    versions = [7 if cut is None else 4 for cut in detail["cuts"]]
    same(detail["continued"], [dataclasses.replace(r, weight_version=v) for r, v in zip(base, versions, strict=True)])

    assert len(detail["stopped"][0].response_ids) == 3
    for stopped, whole in zip(detail["stopped"], free, strict=True):
        ends = [place for place, token in enumerate(whole.response_ids) if token in detail["stops"]]
        length = ends[0] + 1 if ends else len(whole.response_ids)
        assert stopped.response_ids == whole.response_ids[:length]
        assert stopped.finish_reason == ("stop" if ends else "length")
    assert [rollout.response_ids for rollout in detail["one token"]] == [rollout.response_ids[:1] for rollout in free]
    assert {rollout.finish_reason for rollout in detail["one token"]} == {"length"}

    responses = [rollout.response_ids for rollout in base]
    assert len(set(responses[:3])) == len(set(responses[3:6])) == 3  # numbers tell the responses to a prompt apart
    assert all(other.response_ids != ids for other, ids in zip(detail["other seed"], responses, strict=True))
    assert [rollout.response_ids for rollout in detail["again"]] == [responses[1]] * 2

    passed, responded = detail["passed"]
    assert passed == 17 + responded - 5  # the prompt once; the last token of a response never

    starts = [
        "prompt 1: is empty", "prompt 1 of 120 tokens with max_tokens=9: exceeds max_position_embeddings=128",
        "prompt 1: token 131: is not in 0 to 130", "prompt 1: token 2.0: is not in", "stop_token_ids: 131: is not in 0 to 130",
        "partial rollout 1: is finished (stop)", "partial rollout 1: is of another prompt",
        "partial rollout 1 of 2 tokens: leaves none of max_tokens=2", "enough: would have to be called alike",
        "max_batch_size=0: must be 1", "max_prefill_tokens=0: must be 1",
    ]  # fmt: skip
    assert len(detail["refusals"]) == len(starts)
    for message, begin in zip(detail["refusals"], starts, strict=True):
        assert message.startswith(begin)


@pytest.mark.parametrize("name", ["qwen3-tied", "qwen3-moe"])
def test_training_does_not_notice(name, models):
    folder, told = models(name)
    results, modules, failed = run_ranks(1, between_updates, folder, told["sampled"])[0]
    assert failed
    for grads in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(grads, results[0], strict=True))
    trained, partly, generated, broken = modules
    assert trained != partly == generated
    assert broken == trained  # forward_backward trains all of it
