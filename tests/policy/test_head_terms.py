"""Full-vocabulary terms, temperature and backends of the head, against textbook fp64 autograd. Kernels: test_head_kernels.py."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

from megapsft.policy.vocab_parallel import vocab_parallel_logprobs
from megapsft.types import VocabularyTerm
from tests.ranks import run_ranks

TERMS = {
    "none": None,
    "reverse_kl": VocabularyTerm(kind="reverse_kl"),
    "forward_kl": VocabularyTerm(kind="forward_kl"),
    "gem": VocabularyTerm(kind="gem", beta=0.7),
    "gem logsigmoid": VocabularyTerm(kind="gem", beta=0.7, h="logsigmoid"),
}
D = 12


def inputs(tokens: int, vocab: int, dtype: torch.dtype = torch.float64, scale: float = 1.0):
    """hidden, weight, ref_hidden, ref_weight, labels; logits of about `scale` * sqrt(D)."""
    generator = torch.Generator().manual_seed(vocab)
    hidden, ref_hidden = (torch.randn(tokens, D, generator=generator, dtype=torch.float64) * scale for _ in range(2))
    weight, ref_weight = (torch.randn(vocab, D, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(vocab, (tokens,), generator=generator)
    return *(x.to(dtype) for x in (hidden, weight, ref_hidden, ref_weight)), labels


def textbook(hidden, weight, ref_hidden, ref_weight, labels, term, temperature):
    z = hidden @ weight.T / temperature
    log_p = z.log_softmax(-1)
    logprobs, entropy = log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    if term is None:
        return logprobs, entropy
    if term.kind == "gem":
        q = (z / term.beta).softmax(-1).detach()
        h = 1.0 if term.h == "linear" else torch.sigmoid(0.01 * (z - z.gather(1, labels[:, None]))).detach()
        return logprobs, entropy, (q * h * (log_p - logprobs[:, None])).sum(-1)
    log_q = (ref_hidden @ ref_weight.T / temperature).log_softmax(-1)
    left, right = (log_p, log_q) if term.kind == "reverse_kl" else (log_q, log_p)
    return logprobs, entropy, (left.exp() * (left - right)).sum(-1)


def head(
    hidden, weight, ref_hidden, ref_weight, labels, term, temperature=1.0, chunk_bytes=160, group=None, valid=None, **more
):
    needs_ref = term is not None and term.kind != "gem"
    ref = {"ref_hidden": ref_hidden, "ref_weight": ref_weight} if needs_ref else {}
    valid = valid or len(weight)
    return vocab_parallel_logprobs(
        hidden, weight, labels, group, valid, chunk_bytes, temperature=temperature, term=term, **ref, **more
    )


def loss_of(outputs):
    """A scalar in which every token and every output has a weight of its own."""
    weights = (torch.linspace(0.5, 1.5, len(x), dtype=x.dtype, device=x.device).roll(i) for i, x in enumerate(outputs))
    return sum((weight * x).sum() for weight, x in zip(weights, outputs, strict=True))


def check(outputs, grads, expected, expected_grads, tolerance):
    for value, exact in zip(outputs, expected, strict=True):
        torch.testing.assert_close(value.double(), exact.double(), rtol=tolerance, atol=tolerance * 10)
    for grad, exact in zip(grads, expected_grads, strict=True):
        assert float((grad.double() - exact).norm() / exact.norm()) < tolerance * 10


def exact(numbers, term, temperature):
    hidden, weight, ref_hidden, ref_weight, labels = (x.double() if x.is_floating_point() else x for x in numbers)
    hidden.requires_grad_(), weight.requires_grad_()
    outputs = textbook(hidden, weight, ref_hidden, ref_weight, labels, term, temperature)
    return [x.detach() for x in outputs], torch.autograd.grad(loss_of(outputs), (hidden, weight))


def ours(numbers, term, temperature, **more):
    hidden, weight = (x.clone().requires_grad_() for x in numbers[:2])
    outputs = head(hidden, weight, *numbers[2:], term, temperature, **more)
    return [x.detach() for x in outputs], torch.autograd.grad(loss_of(outputs), (hidden, weight))


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_values_and_gradients(term, temperature, dtype, tolerance, backend):
    for (tokens, vocab), scale in itertools.product([(9, 101), (1, 7), (23, 64)], [0.3, 1.0]):
        numbers = inputs(tokens, vocab, dtype, scale)
        check(*ours(numbers, term, temperature, backend=backend), *exact(numbers, term, temperature), tolerance)


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
def test_a_vocabulary_of_qwen(term):
    numbers = inputs(5, 151_936, torch.float32, 0.5)
    check(*ours(numbers, term, 1.0, chunk_bytes=4 * 5 * 10_007), *exact(numbers, term, 1.0), 1e-6)


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
def test_gradcheck(term):
    hidden, weight, ref_hidden, ref_weight, labels = inputs(4, 11)
    if term is not None and term.kind == "gem":  # q and h are constants to the gradient, which gradcheck cannot know
        outputs, grads = ours((hidden, weight, ref_hidden, ref_weight, labels), term, 1.3)
        check(outputs, grads, *exact((hidden, weight, ref_hidden, ref_weight, labels), term, 1.3), 1e-12)
        return
    assert torch.autograd.gradcheck(
        lambda h, w: head(h, w, ref_hidden, ref_weight, labels, term, 1.3),
        (hidden.requires_grad_(), weight.requires_grad_()),
    )


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("chunk_bytes", [1, 4 * 101, 4 * 101 * 7, 10**9])
def test_chunks_do_not_change_a_thing(term, chunk_bytes):
    numbers = inputs(23, 101)
    check(*ours(numbers, term, 1.0, chunk_bytes=chunk_bytes), *ours(numbers, term, 1.0, chunk_bytes=4 * 60), 1e-13)


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
def test_logits_of_eighty(term):
    hidden, weight, ref_hidden, ref_weight, labels = inputs(9, 101, torch.float32)
    logits, ref_logits = (x @ w.T for x, w in ((hidden, weight), (ref_hidden, ref_weight)))
    numbers = hidden * 80 / logits.abs().max(), weight, ref_hidden * 80 / ref_logits.abs().max(), ref_weight, labels
    outputs, grads = ours(numbers, term, 1.0)
    assert all(torch.isfinite(x).all() for x in (*outputs, *grads))
    check(outputs, grads, *exact(numbers, term, 1.0), 5e-6)


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("scale", [1.0, 50.0, 500.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_large_logits_cost_no_more_digits_than_log_softmax_in_fp32(term, scale, temperature):
    """Each output and its own gradient: half the labels are sure, the reference is near, slabs have the largest logit or not."""
    logits, ref_logits, labels = of_scale(scale)
    exactly = each(textbook, logits.double(), ref_logits.double(), labels, term, temperature)
    plainly = each(textbook, logits, ref_logits, labels, term, temperature)
    for chunk_bytes in (4 * len(labels) * 64, 10**9):
        for i, values in enumerate(each(head, logits, ref_logits, labels, term, temperature, chunk_bytes)):
            for ours, plain, exact in zip(values, plainly[i], exactly[i], strict=True):
                assert deviation(ours, exact) < 3 * max(deviation(plain, exact), 2**-24)


def of_scale(scale: float):
    """Logits [64, 501] in fp32 of a deviation of `scale`, those of a reference near them, and labels."""
    generator = torch.Generator().manual_seed(int(scale))
    logits = torch.randn(64, 501, generator=generator) * scale
    ref_logits = logits + torch.randn(64, 501, generator=generator) * scale / 10
    labels = torch.randint(501, (64,), generator=generator)
    labels[::2] = logits[::2].argmax(-1)
    return logits, ref_logits, labels


def each(function, logits, ref_logits, labels, *more):
    """(value, its gradient in the logits) of each output, with an identity for a weight: the logits are exactly these."""
    logits, identity = logits.clone().requires_grad_(), torch.eye(logits.shape[1], dtype=logits.dtype)
    outputs = function(logits, identity, ref_logits, identity, labels, *more)
    return [(x.detach(), *torch.autograd.grad(x.sum(), logits, retain_graph=True)) for x in outputs]


def deviation(value, exact):
    return float((value.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
def test_a_pass_without_gradient_has_the_bits_of_a_training_pass(term):
    for chunk_bytes in (4 * 60, 10**9):
        numbers = inputs(23, 101, torch.float32)
        with torch.no_grad():
            old = head(*numbers, term, chunk_bytes=chunk_bytes)
        new, _ = ours(numbers, term, 1.0, chunk_bytes=chunk_bytes)
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
        assert ((new[0] - old[0]).exp() == 1).all()


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("ranks", "vocab", "rows"), [(2, 101, 128), (4, 250, 256), (4, 60, 256)])
def test_shards_agree_with_the_whole(term, backend, ranks, vocab, rows):
    """Labels on every edge of a shard, shards of nothing but padding, whose weights would win if they counted."""
    for tokens_dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        numbers = edges(vocab, rows // ranks, tokens_dtype)
        outputs, grads = exact(numbers, term, 0.8)
        results = run_ranks(ranks, _shard, term, backend, vocab, rows, tokens_dtype)
        for values, _, _ in results:
            assert all(torch.equal(a, b) for a, b in zip(values, results[0][0], strict=True))
        whole = torch.cat([weight for _, _, weight in results])
        assert whole[vocab:].abs().sum() == 0
        check(results[0][0], (sum(hidden for _, hidden, _ in results), whole[:vocab]), outputs, grads, tolerance)


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_shards_of_a_vocabulary_of_qwen(term, ranks):
    """151,936 rows padded to 152,064, whose shards are no multiple of 1024."""
    vocab, rows = 151_936, 152_064
    outputs, grads = exact(edges(vocab, rows // ranks, torch.float32), term, 0.8)
    results = run_ranks(ranks, _shard, term, "torch", vocab, rows, torch.float32, 4 * 16 * 10_007)
    whole = torch.cat([weight for _, _, weight in results])
    assert whole[vocab:].abs().sum() == 0
    check(results[0][0], (sum(hidden for _, hidden, _ in results), whole[:vocab]), outputs, grads, 1e-6)


def edges(vocab: int, width: int, dtype: torch.dtype):
    hidden, weight, ref_hidden, ref_weight, labels = inputs(16, vocab, dtype)
    borders = [edge for start in range(0, vocab, width) for edge in (start, min(start + width, vocab) - 1)]
    labels[: len(borders)] = torch.tensor(borders)
    return hidden, weight, ref_hidden, ref_weight, labels


def _shard(term, backend, vocab, rows, dtype, chunk_bytes=4 * 50 * 8):
    dist.init_process_group("gloo")
    ranks, rank = dist.get_world_size(), dist.get_rank()
    hidden, weight, ref_hidden, ref_weight, labels = edges(vocab, rows // ranks, dtype)
    padding = torch.full((rows - vocab, D), 9.0, dtype=dtype)
    weight, ref_weight = (torch.cat([w, padding]).chunk(ranks)[rank].clone() for w in (weight, ref_weight))
    hidden.requires_grad_(), weight.requires_grad_()
    outputs = head(
        hidden, weight, ref_hidden, ref_weight, labels, term, 0.8, chunk_bytes, dist.group.WORLD, vocab, backend=backend
    )
    loss_of(outputs).backward()
    result = [x.detach() for x in outputs], hidden.grad, weight.grad
    dist.destroy_process_group()
    return result


def test_bf16_operands_give_fp32_results():
    for term in TERMS.values():
        numbers = inputs(23, 101, torch.bfloat16)
        outputs, grads = ours(numbers, term, 1.0)
        assert {x.dtype for x in outputs} == {torch.float32}
        assert {x.dtype for x in grads} == {torch.bfloat16}
        expected, expected_grads = exact(numbers, term, 1.0)
        for value, e in zip(outputs, expected, strict=True):
            torch.testing.assert_close(value.double(), e, rtol=0.02, atol=0.05)
        for grad, e in zip(grads, expected_grads, strict=True):
            assert float((grad.double() - e).norm() / e.norm()) < 0.02
