"""Quantiles from counts in bins, against those of the values themselves. Not here: ranks (test_reduce.py)."""

import math

import pytest
import torch

from megapsft.metrics.quantile import bins, quantile


@pytest.mark.parametrize("spread", [1e-7, 1e-5, 0.1, 3.0])
def test_as_close_as_the_bins_are(spread):
    values = spread * torch.randn(10_001, generator=torch.Generator().manual_seed(0))
    counts = bins(values, torch.ones_like(values))
    assert counts.sum() == 10_001
    for part in (0.01, 0.5, 0.99):
        exact = values.sort().values[math.ceil(part * 10_001) - 1].item()
        assert quantile(counts, part) == pytest.approx(exact, rel=0.013, abs=1.3e-6)


def test_zero_is_exact_and_counts_of_ranks_add_up():
    values = torch.tensor([0.0, 0.0, 0.5, -0.25])
    ones = torch.ones(2)
    assert quantile(bins(values, torch.ones(4)), 0.5) == 0.0
    assert torch.equal(bins(values[:2], ones) + bins(values[2:], ones), bins(values, torch.ones(4)))


def test_weights_and_what_has_none():
    values = torch.tensor([1.0, 2.0, math.nan, math.inf])
    assert quantile(bins(values, torch.tensor([1.0, 3.0, 0.0, 0.0])), 0.5) == pytest.approx(2.0, rel=0.013)
    assert quantile(bins(values, torch.zeros(4)), 0.5) == 0.0
    assert math.isnan(quantile(bins(values, torch.ones(4)), 0.5))


def test_what_is_beyond_the_bins_counts_as_their_end():
    assert quantile(bins(torch.tensor([-1e9, math.inf]), torch.ones(2)), 0.99) == pytest.approx(20.0)
    assert quantile(bins(torch.tensor([-1e9, math.inf]), torch.ones(2)), 0.01) == pytest.approx(-20.0)
