"""How sure a model is of the tokens of the responses: histograms of their probabilities, as of DFT's Fig. 2."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megapsft.metrics.records import read_records
from megapsft.report.figure import Histogram, Series

BINS = 20


def probability_histogram(logprobs: Mapping[str, Sequence[float | None]], name: str, title: str, note: str = "") -> Histogram:
    """Shares of tokens by probability, on a logarithmic axis as in the paper: few tokens are neither sure nor impossible.

    Args:
        logprobs: what a line is called -> log-probability of each token in nats; None counts as -inf.
    """
    edges = np.linspace(0, 1, BINS + 1)
    series = []
    for number, (of, values) in enumerate(logprobs.items()):
        known = np.exp([-math.inf if value is None else value for value in values])
        counts, _ = np.histogram(np.minimum(known, 1.0), edges)  # rounding may make a sure token surer than that
        series.append(Series(name=of, values=(100 * counts / max(1, len(known))).tolist(), colour=number))
    return Histogram(
        name=name, title=title, x_label="probability of the token (no unit)", y_label="% of tokens", edges=edges.tolist(),
        series=series, log_y=True, note=note,
    )  # fmt: skip


def first_and_last(run: Path) -> dict[str, list[float | None]]:
    """Name -> log-probabilities of the first and of the last step that RUN/tokens recorded; they may be the same, or none."""
    files: dict[str, list[Path]] = {}
    for file in sorted((run / "tokens").glob("step-*.jsonl")):
        files.setdefault(file.name.split("-")[1], []).append(file)
    ends = list(dict.fromkeys([*list(files)[:1], *list(files)[-1:]]))
    return {
        f"step {int(step)}": [value for file in files[step] for line in read_records(file) for value in line["logprobs"]]
        for step in ends
    }


__all__ = ["first_and_last", "probability_histogram"]
