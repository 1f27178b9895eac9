"""Generalised advantage estimation against its definition as a sum. More values: tests/oracles."""

import numpy as np
import pytest

from megapsft.advantages.gae import gae, whiten


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.9), (0.5, 0.0)])
def test_is_the_discounted_sum_of_the_errors_of_the_trained_tokens(gamma, lam):
    random = np.random.default_rng(0)
    rewards, values, mask = random.normal(size=9), random.normal(size=9), random.random(9) < 0.6
    kept = np.flatnonzero(mask)
    assert 2 < len(kept) < 9
    after = np.append(values[kept][1:], 0.0)
    errors = rewards[kept] + gamma * after - values[kept]
    expected = [sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, len(kept))) for t in range(len(kept))]
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    np.testing.assert_allclose(advantages[kept], expected, rtol=1e-12)
    np.testing.assert_allclose(returns[kept], expected + values[kept], rtol=1e-12)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


def test_at_gamma_and_lam_one_every_return_is_the_outcome():
    _, returns = gae(np.array([0.0, 0.0, 1.0]), np.array([0.3, -2.0, 0.7]), np.ones(3, dtype=bool))
    np.testing.assert_allclose(returns, [1, 1, 1])


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e4])
def test_what_is_masked_is_not_read(garbage):
    mask = np.array([True, False, True, False])
    rewards, values = np.array([0.0, garbage, 1.0, garbage]), np.array([0.5, garbage, 0.25, garbage])
    advantages, returns = gae(rewards, values, mask, lam=0.5)
    assert advantages.tolist() == [0.125, 0, 0.75, 0]
    assert returns.tolist() == [0.625, 0, 1, 0]
    whitened = whiten([np.where(mask, advantages, garbage)], [mask])
    np.testing.assert_allclose(whitened, [[-np.sqrt(0.5), 0, np.sqrt(0.5), 0]], rtol=1e-6)


def test_whitened_over_all_sequences_together():
    random = np.random.default_rng(1)
    advantages = [3 + 2 * random.normal(size=n) for n in (4, 1, 7)]
    masks = [random.random(len(a)) < 0.8 for a in advantages]
    trained = np.concatenate([a[m] for a, m in zip(advantages, masks, strict=True)])
    whitened = whiten(advantages, masks)
    found = np.concatenate([w[m] for w, m in zip(whitened, masks, strict=True)])
    assert [w.shape for w in whitened] == [a.shape for a in advantages]
    np.testing.assert_allclose(found, (trained - trained.mean()) / np.sqrt(trained.var(ddof=1) + 1e-8), rtol=1e-12)


@pytest.mark.parametrize("mask", [[False, False], [True, False]])
def test_fewer_than_two_tokens_have_no_spread(mask):
    (whitened,) = whiten([np.array([5.0, 5.0])], [np.array(mask)])
    assert whitened.tolist() == [0, 0]


def test_equal_advantages_are_whitened_to_zero():
    (whitened,) = whiten([np.array([0.5, 0.5])], [np.array([True, True])])
    assert whitened.tolist() == [0, 0]
