"""What benchmarks said while runs were trained."""

from __future__ import annotations

import re

from megapsft.report.folders import Shown
from megapsft.report.lines import Curve
from megapsft.report.section import Section, of_curves

KEY = re.compile(r"evaluate/(?P<benchmark>.+)/(?P<what>avg|pass@\d+|length|unfinished)$")
TITLES = {"avg": ("accuracy", "% of responses", 0.01), "length": ("length of responses", "tokens", 1.0),
          "unfinished": ("responses that were cut", "% of responses", 0.01)}  # fmt: skip
ERRORS = "Bars are two standard errors to either side, over problems."


def section(shown: Shown) -> Section | None:
    keys = dict.fromkeys(key for run in shown.runs for record in run.evaluations for key in record)
    matched = [found for key in keys if (found := KEY.match(key))]
    curves = [_curve(number, *found.group("benchmark", "what")) for number, found in enumerate(matched)]
    return of_curves("Benchmarks", curves, shown.runs)


def _curve(number: int, benchmark: str, what: str) -> Curve:
    title, unit, size = TITLES.get(what, (what, "% of problems", 0.01))
    errors = what not in ("length", "unfinished")
    return Curve(
        name=f"benchmark-{number}", title=f"{benchmark}: {title}", unit=unit, of="evaluations", size=size, dots=True,
        keys={f"evaluate/{benchmark}/{what}": ""}, errors=errors, note=ERRORS if errors else "",
    )  # fmt: skip


__all__ = ["section"]
