"""Profiles of some steps: traces of torch's profiler with what they sum up to, memory snapshots, ranges for Nsight Systems."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from megapsft.config import ProfileConfig, spelled
from megapsft.errors import Refused
from megapsft.platform.cpu import has_cuda
from megapsft.platform.ranges import mark_ranges, span
from megapsft.platform.trace import STEP, Trace, read_trace

MOST_OPERATORS = 20  # of the summary
MOST_ALLOCATIONS = 1_000_000  # that a memory snapshot remembers


def check_profile(config: ProfileConfig, steps: int, world_size: int) -> None:
    """Refuse steps and ranks that there are none of, and what the tool or the machine does not have.

    Steps before the one at which a run continues are not refused: the same command goes on, and their profile is there.

    Args:
        steps: of the whole run.
    """
    if config.steps is not None:
        first, last = config.steps
        if not first <= last <= steps:
            rule = f"are not the first and the last of steps 1 to {steps}"
            raise Refused(f"profile.steps=[{first}, {last}]", rule, f"use {list(next_steps(0, steps))}, or more train.steps")
    beyond = [rank for rank in config.ranks if rank >= world_size]
    if beyond:
        rule = f"is none of the {world_size} rank(s), which are counted from 0"
        raise Refused(f"profile.ranks={list(config.ranks)}: {beyond[0]}", rule, "leave it out, or use [] for all")
    if config.tool == "nsys" and not has_cuda():
        raise Refused("profile.tool=nsys", "needs CUDA", "use profile.tool=torch")
    if config.tool == "nsys" and config.details:
        raise Refused("profile.details=true", "is of profile.tool=torch", "leave it out: nsys has options of its own")


def check_profiles(config: ProfileConfig) -> None:
    """Refuse to be told how to watch where no step is watched: neither profile.steps nor --profile."""
    if config.steps is not None:
        return
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            rule, remedy = "is of steps that are watched, and none are", "name profile.steps, or use --profile"
            raise Refused(f"profile.{field.name}={spelled(value)}", rule, remedy)


def next_steps(done: int, steps: int) -> tuple[int, int]:
    """What `--profile` takes where nothing else is said: the second and third step to come, or as late as there are any.

    The first one allocates, and is like no other.
    """
    return min(done + 2, steps), min(done + 3, steps)


class Profile:
    """What `profile.*` asks for on this rank: nothing where it is not among `profile.ranks`, or a step not in `profile.steps`.

    It looks on and changes no number. Steps are counted from 1, as records count them. Into `folder`, of rank 0 and steps 2 to 3:

        rank-0-steps-2-3.pt.trace.json.gz   the trace: for Perfetto, chrome://tracing, or TensorBoard's profiler
        rank-0-steps-2-3.json, .txt         ranges and operators of it, summed up
        rank-0-steps-2-3.memory.pickle      on CUDA, where profile.memory: for torch's memory viewer
    """

    def __init__(self, config: ProfileConfig, folder: Path, rank: int):
        taking = config.steps is not None and (not config.ranks or rank in config.ranks)
        self._steps = range(config.steps[0], config.steps[1] + 1) if taking else range(0)
        self._config, self._folder, self._rank = config, folder, rank
        self._profiler: torch.profiler.profile | None = None
        self._taken: list[int] = []  # steps, in the profile that is being taken

    def begin(self, number: int) -> None:
        """Before step `number`, and in the time of none: starting a profiler takes as long as small steps."""
        if number in self._steps and not self._taken:
            self._begin()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """The body is step `number`."""
        if number not in self._steps:
            yield
            return
        self._taken.append(number)
        with span(f"{STEP} {number}"):
            yield

    def ends_with(self, number: int) -> bool:
        """Whether step `number` is the last one of the profile that is being taken."""
        return bool(self._taken) and number == self._steps[-1]

    def finish(self) -> None:
        """End the profile that is being taken, if any, and write it: also of fewer steps, where the run stops among them."""
        if not self._taken:
            return
        name = f"rank-{self._rank}-steps-{self._taken[0]}-{self._taken[-1]}"
        self._taken = []
        mark_ranges(False)
        config = self._config
        if config.tool == "nsys":
            torch.cuda.profiler.stop()
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        if config.memory and has_cuda():
            torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        trace = self._folder / f"{name}.pt.trace.json.gz"
        profiler.export_chrome_trace(str(trace))
        found = read_trace(trace)
        (self._folder / f"{name}.json").write_text(json.dumps(as_dict(found), indent=1) + "\n")
        (self._folder / f"{name}.txt").write_text(as_text(found, name))

    def _begin(self) -> None:
        mark_ranges(True)
        config = self._config
        if config.tool == "nsys":
            torch.cuda.profiler.start()
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if has_cuda():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            if config.memory:
                torch.cuda.memory._record_memory_history(max_entries=MOST_ALLOCATIONS)
        self._profiler = torch.profiler.profile(
            activities=activities, record_shapes=config.details, with_stack=config.details
        )
        self._profiler.start()


def as_dict(trace: Trace) -> dict[str, object]:
    """Plain values, for JSON: seconds."""
    return {
        "seconds": trace.seconds,
        "ranges": [dataclasses.asdict(one) | {"share": _share(one.seconds, trace)} for one in trace.ranges],
        "operators": [dataclasses.asdict(one) for one in trace.operators[:MOST_OPERATORS]],
    }


def as_text(trace: Trace, name: str) -> str:
    """Two tables: ranges with their share of the steps, and operators with what they take themselves."""
    heading = f"{'calls':>8} {'seconds':>10} {'share':>7} {'self':>10} {'device':>10}"
    lines = [f"{name}: {trace.seconds:.3f} s", "", f"{'range':<44}{heading}"]
    for one in trace.ranges:
        share, device = f"{_share(one.seconds, trace):.1%}", f"{one.device_seconds:.4f}" if one.device_seconds else "-"
        lines.append(f"{one.name[:44]:<44}{one.calls:>8} {one.seconds:>10.4f} {share:>7} {one.self_seconds:>10.4f} {device:>10}")
    lines += ["", f"{'operator, by what it takes itself':<44}{'calls':>8} {'seconds':>10} {'share':>7}"]
    for one in trace.operators[:MOST_OPERATORS]:
        share = f"{_share(one.self_seconds, trace):.1%}"
        lines.append(f"{one.name[:44]:<44}{one.calls:>8} {one.self_seconds:>10.4f} {share:>7}")
    return "\n".join(lines) + "\n"


def _share(seconds: float, trace: Trace) -> float:
    return seconds / trace.seconds if trace.seconds else 0.0


__all__ = ["Profile", "as_dict", "as_text", "check_profile", "check_profiles", "next_steps"]
