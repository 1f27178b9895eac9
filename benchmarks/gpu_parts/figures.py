"""From raw seconds and bytes to what is claimed: ratios to the ceiling, to the floor, to the peer, and the aims beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from gpu_parts.lines import MEASURED

AIMS: tuple[tuple[str, str, float, str], ...] = (  # what, the figure, its limit, and on which side of it is right
    ("head of one pack, forward and backward, over its floor with recomputation", "head_over_floor", 1.4, "most"),
    ("MFU of SFT, dense slice, bf16", "dense_mfu", 0.45, "least"),
    ("MFU of SFT, MoE slice, bf16, balanced routing", "moe_mfu", 0.25, "least"),
    ("tokens a second of SFT in bf16, over `transformers`", "over_peer", 1.5, "least"),
)
Figures = dict[str, Any]


def figures(result: Mapping[str, Any]) -> Figures:
    """All that follows from `result["parts"]`; None where something that it needs was not measured."""
    found: Figures = {"ceiling": ceiling(result)}
    found["head"] = head(result, found["ceiling"]["bf16_flops"])
    found["steps"] = steps(result, found["ceiling"]["bf16_flops"])
    return found | {"aims": aims(found)}


def measured(result: Mapping[str, Any], part: str) -> dict[str, dict[str, Any]]:
    """The lines of a part that were measured."""
    lines = result.get("parts", {}).get(part, {}).get("lines", {})
    return {name: line for name, line in lines.items() if line["status"] == MEASURED}


def ceiling(result: Mapping[str, Any]) -> Figures:
    """The most of any shape, medians over repetitions: FLOP a second by dtype, and bytes a second of a copy."""
    rates: dict[str, float] = {}
    for name, line in measured(result, "ceiling").items():
        kind = name.split()[0]
        rates[kind] = max(rates.get(kind, 0.0), line.get("flop", line.get("bytes")) / median(line["seconds"]))
    return {"bf16_flops": rates.get("bf16"), "fp8_flops": rates.get("fp8"), "copy_bytes_per_second": rates.get("copy")}


def head(result: Mapping[str, Any], bf16_flops: float | None) -> dict[str, Figures]:
    """By line: seconds, and how often they hold what the products alone take at the measured ceiling."""
    lines, found = measured(result, "head"), {}
    for name, line in lines.items():
        forward, both = median(line["forward_seconds"]), median(line["forward_backward_seconds"])
        plain = lines.get(" ".join([*name.split()[:2], "plain"]))
        floor = line["forward_flop"] / bf16_flops if bf16_flops else None
        found[name] = {
            "forward_seconds": forward,
            "forward_backward_seconds": both,
            "forward_over_floor": forward / floor if floor else None,
            "forward_backward_over_floor": both / (floor * line["products"] / 2) if floor else None,
            "peak_bytes_beside_gradients": line["peak_bytes_beside_gradients"],
            "time_over_plain": both / median(plain["forward_backward_seconds"]) if plain else None,
            "memory_over_plain": over(line["peak_bytes_beside_gradients"], plain and plain["peak_bytes_beside_gradients"]),
        }
    return found


def steps(result: Mapping[str, Any], bf16_flops: float | None) -> dict[str, Figures]:
    """By "PART LINE", such as "dense-bf16 4k psft"."""
    found: dict[str, Figures] = {}
    peak = (result.get("machine") or {}).get("peak_bf16_flops")
    for part, record in result.get("parts", {}).items():
        if part in ("ceiling", "head"):
            continue
        for name, line in measured(result, part).items():
            if "tokens" in line:
                found[f"{part} {name}"] = step(line, record["facts"], peak, bf16_flops)
    for name, one in found.items():
        part, packing, objective = name.split()
        slice_, _, precision = part.partition("-")
        if precision == "peer":
            continue
        rate, peer = one["tokens_per_second"], found.get(f"{slice_}-peer {packing} {objective}")
        bf16, sft = found.get(f"{slice_}-bf16 {packing} {objective}"), found.get(f"{part} {packing} sft")
        one["over_peer"] = over(rate, peer and peer["tokens_per_second"])
        one["over_bf16"] = over(rate, bf16 and bf16["tokens_per_second"]) if precision != "bf16" else None
        one["over_sft"] = over(rate, sft and sft["tokens_per_second"])
    return found


def step(line: Mapping[str, Any], facts: Mapping[str, Any], peak: float | None, bf16_flops: float | None) -> Figures:
    """Of one line of a slice; the peer's has no model FLOP of its own and gets none."""
    seconds = median(line["seconds"])
    found: Figures = {
        "seconds": seconds,
        "tokens_per_second": line["tokens"] / seconds,
        "peak_bytes": line["peak_bytes"],
    }
    if "model_flop" in line:
        rate = line["model_flop"] / seconds
        found |= {"flops": rate, "mfu": over(rate, peak), "of_ceiling": over(rate, bf16_flops)}
    if "head_seconds" in line:
        layers = seconds - line["optimizer_seconds"] - line["head_seconds"]
        found |= {
            "optimizer_share": line["optimizer_seconds"] / seconds,
            "head_share": line["head_seconds"] / seconds,
            "seconds_per_layer_per_token": layers / facts["layers"] / line["tokens"],
        }
    if "old_policy_seconds" in line:
        found["old_policy_share"] = median(line["old_policy_seconds"]) / seconds
    return found


def aims(found: Figures) -> list[Figures]:
    """Each aim with the worst line that it speaks of."""
    sft = {name: one for name, one in found["steps"].items() if name.endswith(" sft")}
    heads = [one["forward_backward_over_floor"] for name, one in found["head"].items() if name.endswith(" triton")]
    values: dict[str, list[float | None]] = {
        "head_over_floor": heads,
        "dense_mfu": [one["mfu"] for name, one in sft.items() if name.startswith("dense-bf16 ")],
        "moe_mfu": [one["mfu"] for name, one in sft.items() if name.startswith("moe-bf16 ")],
        "over_peer": [one["over_peer"] for name, one in sft.items() if "-bf16 " in name],
    }
    return [{"aim": key, "limit": limit, "found": worst(values[key], side), "side": side} for _, key, limit, side in AIMS]


def worst(values: list[float | None], side: str) -> float | None:
    known = [value for value in values if value is not None]
    choose: Callable[[list[float]], float] = max if side == "most" else min
    return choose(known) if known else None


def over(value: float, other: float | None) -> float | None:
    return value / other if other else None
