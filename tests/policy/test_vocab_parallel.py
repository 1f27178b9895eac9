"""The head against the textbook: fp64 autograd over whole logits, for every way of cutting tokens and vocabulary."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megapsft.errors import Refused
from megapsft.policy.head import chunked
from megapsft.policy.vocab_parallel import vocab_parallel_logprobs
from tests.ranks import run_ranks

T, D = 37, 24


def inputs(vocab: int, dtype: torch.dtype = torch.float64, scale: float = 1.0):
    """hidden [T, D], weight [vocab, D], labels [T] with the first and last word among them."""
    generator = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(T, D, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(vocab, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocab, (T,), generator=generator)
    labels[:2] = torch.tensor([0, vocab - 1])
    return hidden.to(dtype), weight.to(dtype), labels


def textbook(hidden, weight, labels):
    log_probabilities = torch.log_softmax(hidden.double() @ weight.double().T, dim=-1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
    return log_probabilities.gather(1, labels[:, None]).squeeze(1), entropy


def loss_of(logprobs, entropy):
    """A scalar in which every token and both outputs have weights of their own."""
    weights = torch.linspace(0.5, 1.5, len(logprobs), dtype=logprobs.dtype)
    return (weights * logprobs).sum() + (weights.flip(0) * entropy).sum()


def head(hidden, weight, labels, chunk_bytes=10**9, valid=None, group=None, entropy_gradient=True):
    valid = weight.shape[0] if valid is None else valid
    return vocab_parallel_logprobs(
        hidden, weight, labels, group, valid, chunk_bytes, entropy_gradient=entropy_gradient
    )


class Memory(TorchDispatchMode):
    """Bytes of what operations under it made and is not freed yet, and the most there were."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.known.update(x.untyped_storage() for x in tree_leaves((arguments, options)) if isinstance(x, torch.Tensor))
        result = operation(*arguments, **(options or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(result) if isinstance(x, torch.Tensor)):
            if storage not in self.known:
                self.known.add(storage)
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return result

    def _count(self, size):
        self.now += size
        self.most = max(self.most, self.now)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_values_and_gradients(dtype, tolerance, scale):
    hidden, weight, labels = inputs(101, dtype, scale)
    exact_hidden, exact_weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    expected = textbook(exact_hidden, exact_weight, labels)
    loss_of(*expected).backward()
    hidden.requires_grad_(), weight.requires_grad_()
    ours = head(hidden, weight, labels)
    loss_of(*ours).backward()
    for value, exact in zip(ours, expected, strict=True):
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), exact.detach(), rtol=tolerance * scale, atol=tolerance * scale * 30)
    for grad, exact in ((hidden.grad, exact_hidden.grad), (weight.grad, exact_weight.grad)):
        assert float((grad.double() - exact).norm() / exact.norm()) < tolerance * 10 * scale


def test_gradcheck():
    hidden, weight, labels = inputs(11)
    hidden, weight = hidden[:5].requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: head(h, w, labels[:5].clamp(max=10)), (hidden, weight))


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 101, 4 * 101 * 7, 4 * 101 * T])
def test_chunks_do_not_change_a_thing(chunk_bytes):
    hidden, weight, labels = inputs(101)
    whole, cut = (head(hidden, weight, labels, size) for size in (10**9, chunk_bytes))
    for a, b in zip(whole, cut, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("chunk_bytes", [300, 10**9])
def test_a_frozen_weight_has_no_gradient_and_changes_none(chunk_bytes):
    hidden, weight, labels = inputs(211)
    gradients = []
    for frozen in (False, True):
        at, by = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        loss_of(*head(at, by, labels, chunk_bytes)).backward()
        assert (by.grad is None) == frozen
        gradients.append(at.grad)
    assert torch.equal(*gradients)


def test_padded_words_have_no_probability_and_no_gradient():
    hidden, weight, labels = inputs(101)
    padded = torch.cat([weight, torch.full((27, D), 50.0, dtype=weight.dtype)]).requires_grad_()
    for ours, expected in zip(head(hidden, padded, labels, valid=101), textbook(hidden, weight, labels), strict=True):
        torch.testing.assert_close(ours, expected)
    loss_of(*head(hidden, padded, labels, valid=101)).backward()
    assert padded.grad[101:].abs().max() == 0
    assert padded.grad[:101].abs().max() > 0


def test_bf16_operands_give_fp32_results():
    hidden, weight, labels = inputs(101, torch.bfloat16)
    logprobs, entropy = head(hidden.requires_grad_(), weight.requires_grad_(), labels)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), textbook(hidden, weight, labels)[0], rtol=0.02, atol=0.05)
    logprobs.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_without_entropy_gradient_the_entropy_is_a_constant():
    hidden, weight, labels = inputs(101)
    hidden.requires_grad_()
    logprobs, entropy = head(hidden, weight, labels, entropy_gradient=False)
    assert logprobs.requires_grad
    assert not entropy.requires_grad


def test_what_one_chunk_keeps_gives_the_gradients_of_recomputing():
    hidden, weight, labels = inputs(101)
    expected_hidden, expected_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs, _ = textbook(expected_hidden, expected_weight, labels)
    loss_of(logprobs, torch.zeros_like(logprobs)).backward()
    for chunk_bytes in (10**9, 4 * 101 * T, 4 * 101 * 7):  # the second holds all of it, to the byte
        ours_hidden, ours_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs, entropy = head(ours_hidden, ours_weight, labels, chunk_bytes, entropy_gradient=False)
        loss_of(logprobs, entropy).backward()
        torch.testing.assert_close(ours_hidden.grad, expected_hidden.grad, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(ours_weight.grad, expected_weight.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [37, 100])  # one tile of tokens, and three
def test_no_number_of_tokens_makes_the_backward_pass_hold_more_than_one_gradient_of_the_weight(tokens, dtype, monkeypatch):
    monkeypatch.setattr(chunked, "MOST_TOKENS", 40)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 640, generator=generator).to(dtype).requires_grad_() for rows in (tokens, 3001))
    loss = loss_of(*head(hidden, weight, torch.arange(tokens), 4 * 40 * 64))
    with Memory() as memory:
        loss.backward()
    beside = memory.most - sum(x.grad.nbytes for x in (hidden, weight))
    assert 0 < beside < weight.grad.nbytes / 4


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 8 * 16, 4 * 8 * 101])
def test_tokens_by_tiles_have_the_gradients_of_one_tile(chunk_bytes, monkeypatch):
    hidden, weight, labels = inputs(101)
    grads = []
    for most in (chunked.MOST_TOKENS, 8):  # 37 tokens are five tiles
        monkeypatch.setattr(chunked, "MOST_TOKENS", most)
        operands = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        grads.append(torch.autograd.grad(loss_of(*head(*operands, labels, chunk_bytes)), operands))
    for one, tiles in zip(*grads, strict=True):
        torch.testing.assert_close(tiles, one, rtol=1e-12, atol=1e-12)


def test_a_large_budget_is_spent_on_tokens_first_and_then_on_columns():
    """One product over all tokens writes the weight's gradient; several need an fp32 sum beside it."""

    def tile(tokens, chunk_bytes, columns=151_936):
        vocabulary = chunked.Vocabulary(
            group=None, first=0, columns=columns, chunk_bytes=chunk_bytes, temperature=1.0, entropy_gradient=False, term=None
        )
        return chunked._tile(tokens, vocabulary)

    assert tile(32_768, 2**26) == (8192, 2048)
    assert tile(32_768, 2**28) == (32_768, 2048)
    assert tile(32_768, 2**30) == (32_768, 8192)
    assert tile(8192, 2**30) == (8192, 32_768)
    assert tile(500, 2**20) == (500, 512)


def test_what_was_kept_is_not_read_twice():
    """The gradient lies in the place of the logits that were kept; a second backward pass would take it for logits."""
    hidden, weight, labels = inputs(101)
    logprobs, _ = head(hidden.requires_grad_(), weight, labels, entropy_gradient=False)
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.sum().backward()


def test_more_words_than_rows_are_refused():
    hidden, weight, labels = inputs(101)
    with pytest.raises(Refused, match="vocabulary of 102: exceeds the 101 rows"):
        head(hidden, weight, labels, valid=102)


@pytest.mark.parametrize(("ranks", "vocab", "rows"), [(2, 101, 128), (2, 7, 128), (4, 250, 256), (4, 129, 256), (4, 64, 256)])
def test_vocabulary_shards_agree_with_the_whole(ranks, vocab, rows):
    """Odd shards, labels on every shard, shards of padding only; the same bits on every rank."""
    hidden, weight, labels = inputs(vocab)
    exact_hidden, exact_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = textbook(exact_hidden, exact_weight, labels)
    loss_of(*expected).backward()
    results = run_ranks(ranks, _shard, vocab, rows)
    for logprobs, entropy, _, _ in results:
        assert torch.equal(logprobs, results[0][0])
        assert torch.equal(entropy, results[0][1])
    torch.testing.assert_close(results[0][0], expected[0].detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(results[0][1], expected[1].detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(r[2] for r in results), exact_hidden.grad, rtol=1e-11, atol=1e-12)
    stacked = torch.cat([r[3] for r in results])
    torch.testing.assert_close(stacked[:vocab], exact_weight.grad, rtol=1e-11, atol=1e-12)
    assert stacked[vocab:].abs().sum() == 0


@pytest.mark.parametrize(("ranks", "vocab", "rows"), [(2, 101, 128), (4, 129, 256)])
def test_shards_that_keep_their_chunk_agree_with_the_whole(ranks, vocab, rows):
    hidden, weight, labels = inputs(vocab)
    exact_hidden, exact_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs, _ = textbook(exact_hidden, exact_weight, labels)
    loss_of(logprobs, torch.zeros_like(logprobs)).backward()
    results = run_ranks(ranks, _shard, vocab, rows, 10**9, False)
    torch.testing.assert_close(sum(r[2] for r in results), exact_hidden.grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(torch.cat([r[3] for r in results])[:vocab], exact_weight.grad, rtol=1e-11, atol=1e-12)


def _shard(vocab: int, rows: int, chunk_bytes: int = 4 * 50 * 8, entropy_gradient: bool = True):
    dist.init_process_group("gloo")
    hidden, weight, labels = inputs(vocab)
    padded = torch.cat([weight, torch.full((rows - vocab, D), 9.0, dtype=weight.dtype)])
    mine = padded.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    hidden.requires_grad_()
    logprobs, entropy = head(hidden, mine, labels, chunk_bytes, vocab, dist.group.WORLD, entropy_gradient)
    loss_of(logprobs, entropy).backward()
    result = logprobs.detach(), entropy.detach(), hidden.grad, mine.grad
    dist.destroy_process_group()
    return result
