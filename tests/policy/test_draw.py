"""Drawing tokens: noise against SplitMix64 in whole numbers, frequencies against the exact distribution, shards against all."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megapsft.policy.draw import draw, gumbel, sample_key
from megapsft.rollout.base import Sampling
from tests.ranks import run_ranks

MASK, GOLDEN = 2**64 - 1, 0x9E3779B97F4A7C15
LOGITS = [0.3, -1.0, 1.5, 1.5, -0.2, 0.0, -math.inf, 2.0, 0.3]  # two pairs of equals, and one that cannot be
ROWS = 40_000
SAMPLINGS = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 2},  # which cuts the first pair of equals in two
    "top_p": {"top_p": 0.5},
    "top_p at a temperature": {"top_p": 0.8, "temperature": 2.0},
    "both, top_k is less": {"top_p": 0.9, "top_k": 3},
    "both, top_p is less": {"top_p": 0.6, "top_k": 5},
    "least top_p": {"top_p": 1e-9},
    "greedy": {"temperature": 0.0},
    "more than there are": {"top_k": 99},
}


def split_mix(seed: int, number: int) -> int:
    """Output `number`, from 0, of the generator: Figure 16 of its paper."""
    z = (seed + (number + 1) * GOLDEN) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def exact(logits: list[float], sampling: Sampling) -> tuple[list[float], list[float]]:
    """(the distribution that tokens are drawn from, log-probabilities before the cuts), by the words of Sampling's docstring."""
    z = [logit / (sampling.temperature or 1) for logit in logits]
    total = math.fsum(map(math.exp, z))
    p = [math.exp(x) / total for x in z]
    order = sorted(range(len(z)), key=lambda token: (-z[token], token))
    before = dict(zip(order, itertools.accumulate((p[token] for token in order), initial=0), strict=False))
    top_k = 1 if sampling.temperature == 0 else sampling.top_k
    left = [
        p[token] if (top_k == -1 or order.index(token) < top_k) and before[token] < sampling.top_p else 0
        for token in range(len(z))
    ]
    return [x / math.fsum(left) for x in left], [math.log(x) if x else -math.inf for x in p]


def keys(rows: int) -> torch.Tensor:
    return torch.tensor([sample_key(9, (1, 2, 3), number) for number in range(rows)])


def test_the_generator_is_split_mix():
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]  # of the seed 1234567, as published
    assert [split_mix(1234567, number) for number in range(3)] == known
    seeds, positions = [1234567, -5, 2**63 - 1], [0, 7, 31]
    noise = gumbel(torch.tensor(seeds), torch.tensor(positions), 3, 5)
    for row, seed, position in zip(noise.tolist(), seeds, positions, strict=True):
        stream = split_mix(seed, position)
        for column, value in enumerate(row, start=3):
            uniform = ((split_mix(stream, column) >> 12) + 0.5) / 2**52
            assert value == pytest.approx(-math.log(-math.log(uniform)), rel=1e-12)


def test_the_noise_of_a_shard_is_a_part_of_the_whole():
    some, positions = keys(4), torch.arange(4)
    whole = gumbel(some, positions, 0, 20)
    parts = [gumbel(some, positions, first, count) for first, count in ((0, 7), (7, 1), (8, 12))]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_noise_of_neighbours_is_independent():
    """Of samples, positions and columns beside each other; and it has the mean and variance of a Gumbel variable."""
    rows = keys(200)
    noise = torch.stack([gumbel(rows, torch.full((200,), position), 0, 50) for position in range(20)])
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)  # 200,000 numbers: their mean within 0.003
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)
    for dim in range(3):
        beside = torch.stack([noise.narrow(dim, 0, noise.shape[dim] - 1), noise.narrow(dim, 1, noise.shape[dim] - 1)])
        assert abs(torch.corrcoef(beside.flatten(1))[0, 1].item()) < 0.01


def test_keys_tell_seed_prompt_and_number_apart():
    made = [(0, (1, 2), 0), (1, (1, 2), 0), (0, (1, 3), 0), (0, (1, 2), 1), (0, (1,), 2), (0, (0, 1, 2), 0), (2**62, (1, 2), 0)]
    assert len({sample_key(*arguments) for arguments in made}) == len(made)
    assert sample_key(0, (1, 2), 0) == sample_key(0, [1, 2], 0)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_frequencies_are_those_of_the_exact_distribution(name):
    sampling = Sampling(max_tokens=1, **SAMPLINGS[name])
    logits = torch.tensor(LOGITS).expand(ROWS, -1)
    tokens, logprobs = draw(logits, 0, None, sampling, keys(ROWS), torch.zeros(ROWS, dtype=torch.int64))
    distribution, before_cuts = exact(LOGITS, sampling)
    torch.testing.assert_close(logprobs, torch.tensor(before_cuts)[tokens], atol=1e-5, rtol=0)
    assert logprobs.dtype == torch.float32
    counts, expected = np.bincount(tokens, minlength=len(LOGITS)), ROWS * np.array(distribution)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 26.1  # exceeded by chance once in a thousand, with the 8 degrees of freedom of all; the seed is fixed


def sharded(columns: int):
    """On one rank of 3: draws from its shard of 2, 2 and 2 columns, of which the last are padding; and from all at once."""
    dist.init_process_group("gloo")
    rank, group, told = dist.get_rank(), dist.group.WORLD, []
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 6, generator=generator).round(decimals=1)  # some are equal
    logits[:, columns:] = -torch.inf
    for options in SAMPLINGS.values():
        sampling = Sampling(max_tokens=1, **options)
        arguments = sampling, keys(50), torch.arange(50)
        mine = draw(logits[:, 2 * rank : 2 * rank + 2], 2 * rank, group, *arguments)
        told.append([x.numpy() for x in (*mine, *draw(logits, 0, None, *arguments))])
    dist.destroy_process_group()
    return told


@pytest.mark.parametrize("columns", [6, 5, 3])  # 3: the last rank has nothing but padding
def test_shards_draw_what_the_whole_draws(columns):
    for told in run_ranks(3, sharded, columns):
        assert len(told) == len(SAMPLINGS)
        for tokens, logprobs, whole_tokens, whole_logprobs in told:
            assert np.array_equal(tokens, whole_tokens)
            assert tokens.max() < columns
            np.testing.assert_allclose(logprobs, whole_logprobs, atol=1e-6, rtol=0)
