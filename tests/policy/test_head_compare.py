"""Logits of one model beside those of another, against fp64 logits that are held whole."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megapsft.policy.head.compare import CHANNELS, compare_logits
from tests.ranks import run_ranks

T, D, FINER_D = 23, 12, 14


def operands(vocab: int, rows: int, dtype: torch.dtype = torch.float64):
    """hidden, weight, and those of a model near it with longer hidden states; padded rows would win if they counted."""
    generator = torch.Generator().manual_seed(vocab)
    finer_hidden = torch.randn(T, FINER_D, generator=generator, dtype=torch.float64)
    finer_weight = torch.randn(vocab, FINER_D, generator=generator, dtype=torch.float64)
    hidden = finer_hidden[:, :D] + 0.05 * torch.randn(T, D, generator=generator, dtype=torch.float64)
    padding = torch.full((rows - vocab, FINER_D), 50.0, dtype=torch.float64)
    finer_weight = torch.cat([finer_weight, padding])
    return hidden.to(dtype), finer_weight[:, :D].to(dtype), finer_hidden, finer_weight


def textbook(hidden, weight, finer_hidden, finer_weight, vocab, temperature):
    z, r = (h.double() @ w[:vocab].double().T / temperature for h, w in ((hidden, weight), (finer_hidden, finer_weight)))
    log_p, log_q = z.log_softmax(-1), r.log_softmax(-1)
    return {
        "logits_rms": (z - r).norm(dim=1) / r.norm(dim=1),
        "logits_max": (z - r).abs().amax(1) / r.abs().amax(1),
        "kl": (log_p.exp() * (log_p - log_q)).sum(1),
        "same_top": (z.argmax(1) == r.argmax(1)).double(),
    }


@pytest.mark.parametrize("chunk_bytes", [1, 8 * 101 * 7, 10**9])
def test_it_is_the_textbook(chunk_bytes):
    numbers = operands(101, 128)
    found = compare_logits(*numbers, None, 101, chunk_bytes, 0.8)
    expected = textbook(*numbers, 101, 0.8)
    for name, values in zip(CHANNELS, found, strict=True):
        torch.testing.assert_close(values, expected[name], rtol=1e-11, atol=1e-13)
    assert 0.3 < expected["same_top"].mean() < 1


def test_a_model_beside_itself():
    hidden, weight, *_ = operands(101, 128, torch.bfloat16)
    rms, largest, kl, same_top = compare_logits(hidden, weight, hidden, weight, None, 101, 10**9)
    assert torch.equal(rms, torch.zeros_like(rms))
    assert torch.equal(largest, torch.zeros_like(rms))
    assert kl.abs().max() < 1e-15
    assert torch.equal(same_top, torch.ones_like(rms))


def test_of_two_words_that_are_equal_after_rounding_either_is_the_likeliest():
    finer = torch.tensor([[1.0, 1.001, 0.0]])
    ours = finer.bfloat16()
    words = torch.eye(3)
    assert compare_logits(ours, words.bfloat16(), finer, words, None, 3, 10**9)[3] == 1
    assert compare_logits(torch.tensor([[1.0, 0.9, 0.0]]), words, finer, words, None, 3, 10**9)[3] == 0


def test_no_tokens():
    hidden, weight, finer_hidden, finer_weight = operands(101, 128)
    assert compare_logits(hidden[:0], weight, finer_hidden[:0], finer_weight, None, 101, 10**9).shape == (4, 0)


@pytest.mark.parametrize(("ranks", "vocab", "rows"), [(2, 101, 128), (4, 60, 256)], ids=["odd shards", "shards of padding"])
def test_vocabulary_shards_agree_with_the_whole(ranks, vocab, rows):
    results = run_ranks(ranks, _shard, vocab, rows)
    expected = textbook(*operands(vocab, rows), vocab, 1.0)
    for found in results:
        assert torch.equal(found, results[0])
        for name, values in zip(CHANNELS, found, strict=True):
            torch.testing.assert_close(values, expected[name], rtol=1e-11, atol=1e-13)


def _shard(vocab: int, rows: int) -> torch.Tensor:
    dist.init_process_group("gloo")
    hidden, weight, finer_hidden, finer_weight = operands(vocab, rows)
    mine, finer = (w.chunk(dist.get_world_size())[dist.get_rank()] for w in (weight, finer_weight))
    found = compare_logits(hidden, mine, finer_hidden, finer, dist.group.WORLD, vocab, 8 * 16 * 5)
    dist.destroy_process_group()
    return found
