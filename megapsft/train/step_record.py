"""From the metrics of a step's updates to those of the step, and how fast either was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megapsft.platform.chips import TFLOPS


def of_step(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of one step; what is a mean over tokens stays one over those of all its updates.

    Args:
        updates: of the step, one at least, with the same keys; each has `data/trained_tokens`.
    """
    tokens = sum(update["data/trained_tokens"] for update in updates)
    record: dict[str, float] = {}
    for key in updates[0]:
        values = [update[key] for update in updates]
        if key.startswith("data/") or key in ("perf/seconds", "perf/model_flops"):
            record[key] = sum(values)
        elif key.endswith(("_max", "/max")):
            record[key] = max(values)
        elif key.endswith(("_min", "/min")):
            record[key] = min(values)
        elif key.endswith("grad_norm"):
            record[key] = sum(values) / len(values)
        elif key in ("train/lr", "train/skipped_updates"):
            record[key] = values[-1]
        else:
            weighted = sum(v * update["data/trained_tokens"] for v, update in zip(values, updates, strict=True))
            record[key] = weighted / tokens if tokens else 0.0
    return record


def speed(metrics: Mapping[str, float], world_size: int, peak_flops: float | None) -> dict[str, float]:
    """How much went through in the seconds of an update, or of a step.

    Args:
        peak_flops: FLOP/s of a device, where they are known; without them there is no `perf/mfu`.
    """
    seconds = metrics["perf/seconds"]
    flops = metrics["perf/model_flops"] / seconds / world_size
    found = {"perf/tokens_per_second": metrics["data/real_tokens"] / seconds, "perf/tflops_per_device": flops / TFLOPS}
    return found | ({"perf/mfu": flops / peak_flops} if peak_flops else {})


__all__ = ["of_step", "speed"]
