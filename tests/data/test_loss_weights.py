import numpy as np
import pytest
import torch

from megapsft.data.loss_weights import AGGREGATIONS, loss_weights
from megapsft.errors import Refused

LOSSES = np.array([[0.2, 1.1, 0.05, 2.3], [0.7, 0.4, 3.0, 0.9], [1.5, 0.1, 0.6, 0.35]])
FULL = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]], dtype=bool)
EMPTY_ROW = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]], dtype=bool)
ORACLE = [  # aggregation, of FULL, of EMPTY_ROW; L = 4
    ("token-mean", 1.0388888888888888, 0.8750000000000001),
    ("seq-mean-token-mean", 1.0263888888888888, 0.85625),
    ("seq-mean-token-sum", 3.1166666666666667, 2.6249999999999996),
    ("sum-over-Lmax", 2.3375, 1.3124999999999998),
    ("sum-over-B-Lmax", 0.7791666666666667, 0.43750000000000006),
    ("token-sum", 9.35, 5.25),
]


@pytest.mark.parametrize(("aggregation", "full", "empty_row"), ORACLE)
def test_values_of_the_specification(aggregation, full, empty_row):
    for mask, expected in ((FULL, full), (EMPTY_ROW, empty_row)):
        assert np.sum(np.stack(loss_weights(mask, aggregation, 4)) * LOSSES) == pytest.approx(expected, rel=1e-6)


def test_the_oracle_names_every_aggregation():
    assert {name for name, *_ in ORACLE} == set(AGGREGATIONS)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_all_masked_weighs_nothing(aggregation):
    weights = np.stack(loss_weights(np.zeros((3, 4), dtype=bool), aggregation, 4))
    assert weights.tolist() == np.zeros((3, 4)).tolist()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_masked_tokens_weigh_nothing_and_trained_ones_something(aggregation):
    for row, mask in zip(loss_weights(EMPTY_ROW, aggregation, 4), EMPTY_ROW, strict=True):
        assert np.array_equal(row > 0, mask)
        assert row.dtype == np.float64


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_rows_of_other_lengths_weigh_as_their_padded_matrix(aggregation):
    ragged = loss_weights([row[:n] for row, n in zip(FULL, (4, 3, 2), strict=True)], aggregation, 4)
    for short, padded in zip(ragged, loss_weights(FULL, aggregation, 4), strict=True):
        assert short.tolist() == padded[: len(short)].tolist()


def test_a_tensor_is_taken_as_well():
    assert np.array_equal(loss_weights(torch.from_numpy(FULL), "token-mean"), loss_weights(FULL, "token-mean"))


def test_weights_are_fp64():
    weights = loss_weights([np.ones(3_000_001, dtype=bool)], "token-mean")[0]
    assert weights[0] == 1 / 3_000_001


def test_an_unknown_aggregation_is_refused():
    with pytest.raises(Refused, match="use one of token-mean, "):
        loss_weights(FULL, "mean")


@pytest.mark.parametrize("aggregation", ["sum-over-B-Lmax", "sum-over-Lmax"])
@pytest.mark.parametrize("length", [None, 0])
def test_a_missing_max_response_length_is_refused(aggregation, length):
    with pytest.raises(Refused, match="max_response_length"):
        loss_weights(FULL, aggregation, length)
