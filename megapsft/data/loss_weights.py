"""How per-token losses become one number: every aggregation is linear, so it is a weight for each token."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from megapsft.errors import Refused

AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum-over-B-Lmax", "sum-over-Lmax", "token-sum")


def loss_weights(mask: Iterable, aggregation: str, max_response_length: int | None = None) -> list[np.ndarray]:
    """Weights w with loss = sum of w * per-token loss, over all samples of one update.

    With the mask m, N = sum of m, n_i = sum of m in sample i, S = number of samples with n_i > 0, B = number of samples,
    L = max_response_length:

        token-mean           m / N
        seq-mean-token-mean  m / (S n_i)
        seq-mean-token-sum   m / S
        sum-over-B-Lmax      m / (B L)
        sum-over-Lmax        m / L
        token-sum            m

    Where nothing is trained all weights are 0, never NaN. Computed in fp64.

    Args:
        mask: one bool array [n_i] a sample, of any lengths; a [B, L] array or tensor is such a sequence of rows.

    Returns:
        One fp64 array a sample, of the length of its mask.

    Raises:
        Refused: an unknown aggregation, or one over L without max_response_length.

    Example:
        >>> loss_weights([np.array([False, True, True]), np.array([True])], "seq-mean-token-mean")
        [array([0.  , 0.25, 0.25]), array([0.5])]
    """
    if aggregation not in AGGREGATIONS:
        raise Refused(f"aggregation={aggregation!r}", "is not known", f"use one of {', '.join(AGGREGATIONS)}")
    if aggregation.endswith("Lmax") and not max_response_length:
        raise Refused(f"aggregation={aggregation!r}", "divides by max_response_length, which is not set", "set it, above 0")

    rows = [np.asarray(row, dtype=bool) for row in mask]
    trained = np.array([row.sum() for row in rows], dtype=np.float64)  # n_i
    filled = max((trained > 0).sum(), 1)  # S
    match aggregation:
        case "token-mean":
            denominators = np.full(len(rows), trained.sum())
        case "seq-mean-token-mean":
            denominators = filled * trained
        case "seq-mean-token-sum":
            denominators = np.full(len(rows), filled)
        case "sum-over-B-Lmax":
            denominators = np.full(len(rows), len(rows) * max_response_length)
        case "sum-over-Lmax":
            denominators = np.full(len(rows), max_response_length)
        case "token-sum":
            denominators = np.ones(len(rows))
    weights = 1.0 / np.maximum(denominators, 1.0)  # a sample without trained tokens has a mask of zeros to multiply with
    return [row * weight for row, weight in zip(rows, weights, strict=True)]
