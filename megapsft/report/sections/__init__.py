"""The sections of a report: a file each, with a function that makes it of what is shown, or None where there is nothing."""

from __future__ import annotations

from collections.abc import Callable

from megapsft.report.folders import Shown
from megapsft.report.section import Section
from megapsft.report.sections import (
    benchmarks,
    comparisons,
    configs,
    measurements,
    noise,
    overview,
    pipelines,
    preferences,
    remaining,
    rewards,
    speed,
    sweeps,
    tokens,
    training,
)

SECTIONS: tuple[Callable[[Shown], Section | None], ...] = (  # in the order of the page
    overview.section,
    pipelines.section,
    training.section,
    tokens.section,
    comparisons.section,
    benchmarks.section,
    preferences.section,
    rewards.section,
    noise.section,
    speed.section,
    remaining.section,
    sweeps.section,
    measurements.section,
    configs.section,
)


def sections(shown: Shown) -> list[Section]:
    """All that have anything to show."""
    return [found for found in (make(shown) for make in SECTIONS) if found is not None]


__all__ = ["SECTIONS", "sections"]
