"""What a trace of torch's profiler holds, by range and by operator."""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEP = "step"  # the range of a whole step, behind which its number stands
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True, kw_only=True)
class Total:
    """Of everything of one name."""

    name: str
    calls: int
    seconds: float  # on the host, what is inside included; of operators of a device: there
    self_seconds: float  # what is inside left out
    device_seconds: float  # of a range: from its first operator on the device to its last; 0 where there is no device


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Largest first."""

    ranges: tuple[Total, ...]
    operators: tuple[Total, ...]  # of the device; where there is none, of the host, by their self_seconds

    @property
    def seconds(self) -> float:
        """Of the whole steps."""
        return sum(one.seconds for one in self.ranges if one.name == STEP)


def read_trace(path: Path) -> Trace:
    """Sum up a trace (.json, or .json.gz) that torch's profiler exported."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    of_device: dict[str, float] = defaultdict(float)
    for event in events:
        if event.get("cat") == "gpu_user_annotation":
            of_device[_name(event)] += event["dur"] / 1e6
    ranges = totals((event for event in events if event.get("cat") == "user_annotation"), of_device)
    operators = totals(event for event in events if event.get("cat") in DEVICE)
    if not operators:
        operators = totals(event for event in events if event.get("cat") == "cpu_op")
    return Trace(
        ranges=tuple(sorted(ranges, key=lambda one: -one.seconds)),
        operators=tuple(sorted(operators, key=lambda one: -one.self_seconds)),
    )


def totals(events: Iterable[dict[str, Any]], of_device: dict[str, float] | None = None) -> list[Total]:
    """Of events that lie one in another, or beside one another, on each thread (stream); by name.

    Example:
        a: 0 to 10 us, in it b: 2 to 5 us  ->  a: 10 us, 7 of them its own; b: 3 us
    """
    calls: dict[str, int] = defaultdict(int)
    spent: dict[str, float] = defaultdict(float)
    inside: dict[str, float] = defaultdict(float)
    outer: dict[tuple[Any, Any], list[dict[str, Any]]] = defaultdict(list)
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        around = outer[event["pid"], event["tid"]]
        while around and around[-1]["ts"] + around[-1]["dur"] <= event["ts"]:
            around.pop()
        if around:
            inside[_name(around[-1])] += event["dur"] / 1e6
        around.append(event)
        calls[_name(event)] += 1
        spent[_name(event)] += event["dur"] / 1e6
    return [
        Total(
            name=name,
            calls=calls[name],
            seconds=spent[name],
            self_seconds=spent[name] - inside[name],
            device_seconds=(of_device or {}).get(name, 0.0),
        )
        for name in calls
    ]


def _name(event: dict[str, Any]) -> str:
    """All steps are one range."""
    return STEP if re.fullmatch(rf"{STEP} \d+", event["name"]) else event["name"]


__all__ = ["STEP", "Total", "Trace", "read_trace", "totals"]
