"""Cases of the objective "aggregation": what loss_weights make of given per-token losses."""

from __future__ import annotations

from typing import Any

import torch

from megapsft.objectives.registry import build_objective
from tests.oracles.batches import weigh

# what other trainers effectively optimise, given in the vectors for contrast
NOT_OURS = ("mean_of_micro_means", "verl_")


def evaluate_aggregation(case: dict[str, Any], dtype: torch.dtype) -> dict[str, float]:
    """Each aggregation that the case asks for; where it has `micro_batches`, summed one after the other."""
    losses = torch.tensor(case["inputs"]["per_token"], dtype=dtype)
    mask = torch.tensor(case["inputs"]["mask"], dtype=torch.bool)
    parts = case["inputs"].get("micro_batches", [list(range(len(mask)))])
    length = case["hparams"].get("L_max")

    result = {}
    for key in case["outputs"]:
        if key.startswith(NOT_OURS):
            result[key] = case["outputs"][key]
            continue
        aggregation = "token-mean" if key == "global_token_mean" else key
        options = {"max_response_length": length} if aggregation.endswith("Lmax") else {}
        build_objective({"name": "sft", "aggregation": aggregation} | options)  # the objectives know it as well
        weights = weigh(mask, aggregation, length, dtype)
        result[key] = sum((weights[rows] * torch.where(mask[rows], losses[rows], 0)).sum().item() for rows in parts)
    return result
