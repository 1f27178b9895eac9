"""Whatever else was recorded: a chart for each key that no other section draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megapsft.metrics.names import METRICS, PARTS
from megapsft.report.folders import Shown
from megapsft.report.lines import Curve
from megapsft.report.run import Run
from megapsft.report.section import Section, of_curves
from megapsft.report.sections import preferences, rewards, speed, training

CURVES = (*training.CURVES, *preferences.CURVES, *rewards.CURVES, *speed.CURVES)
ELSEWHERE = {key for curve in CURVES for key in (*curve.keys, *(curve.band or ()))} | {f"perf/{part}_seconds" for part in PARTS}


def section(shown: Shown) -> Section | None:
    constant, changing = [], []
    for key, of in _keys(shown.runs):
        values = {record[key] for run in shown.runs for record in getattr(run, of) if record.get(key) is not None}
        if len(values) == 1:
            constant.append(f"{key} {values.pop():.4g}")
        elif values:
            changing.append(_curve(len(changing), key, of))
    note = f"The same throughout: {', '.join(constant)}." if constant else ""
    return of_curves("Everything else that was recorded", changing, shown.runs, note)


def _keys(runs: Sequence[Run]) -> Iterator[tuple[str, str]]:
    """(key, file) of metrics; those of a step only where an update does not have them."""
    seen = set(ELSEWHERE)
    for of in ("updates", "steps"):
        for key in dict.fromkeys(key for run in runs for record in getattr(run, of) for key in record if "/" in key):
            single_reward = key.startswith("reward/") and key not in METRICS
            if key not in seen and not single_reward:
                yield key, of
            seen.add(key)


def _curve(number: int, key: str, of: str) -> Curve:
    unit = key.rpartition("/")[2].replace("_", " ")
    return Curve(name=f"other-{number}", title=key, unit=unit, keys={key: ""}, of=of, note=METRICS.get(key, ""))


__all__ = ["section"]
