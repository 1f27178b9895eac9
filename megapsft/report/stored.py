"""What a benchmark measured, with its figures as JSON beside it: drawn as its picture, and shown on any report."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from megapsft.errors import Refused
from megapsft.output.whole import write_whole
from megapsft.report.figure import Bars, Chart, Grid, Histogram, Line, Mark, Series, Span
from megapsft.report.png import write_png

FIGURES = "pictures"  # the key of the file
KINDS = {kind.__name__.lower(): kind for kind in (Bars, Chart, Grid, Histogram)}
PARTS = {"lines": Line, "series": Series, "marks": Mark, "limits": Mark, "spans": Span}
REMEDY = "let the benchmark that wrote it measure again"

Stored = Bars | Chart | Grid | Histogram


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A benchmark's file."""

    name: str
    note: str  # when and on what it was measured
    figures: Sequence[Stored]


def write_measurement(measured: dict[str, Any], figures: Sequence[Stored], out_json: Path, out_png: Path | None = None) -> None:
    """Write what was measured with its figures; and draw those that are not tables. Folders are made."""
    write_whole(out_json, json.dumps(measured | {FIGURES: [to_json(figure) for figure in figures]}, indent=1) + "\n")
    if out_png is not None:
        write_png([figure for figure in figures if not isinstance(figure, Grid)], out_png)


def read_measurement(file: Path) -> Measurement:
    """
    Raises:
        Refused: no JSON, or none with figures.
    """
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise Refused(str(file), f"is not JSON ({error})", REMEDY) from None
    if not isinstance(content, dict) or not isinstance(content.get(FIGURES), list):
        raise Refused(str(file), f"is not of a benchmark: it has no list of {FIGURES}", REMEDY)
    try:
        figures = [from_json(record) for record in content[FIGURES]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Refused(str(file), f"holds a figure that cannot be drawn ({error!r})", REMEDY) from None
    machine = content.get("machine")
    cores = [f"{machine['cpus']} cores"] if isinstance(machine, dict) and "cpus" in machine else []
    note = ", ".join([file.name, *filter(None, [content.get("date")]), *cores])
    return Measurement(name=str(content.get("benchmark", file.stem)), note=note, figures=figures)


def to_json(figure: Stored) -> dict[str, Any]:
    """Its fields but those that are as by default; numbers that are not known are null."""
    return {"kind": type(figure).__name__.lower()} | _fields(figure)


def from_json(record: dict[str, Any]) -> Stored:
    """
    Raises:
        KeyError, TypeError, ValueError: an unknown kind, or fields that the kind has not, or lacks.
    """
    kind = KINDS[record["kind"]]
    known = {name: _read(name, value) for name, value in record.items() if name != "kind"}
    return kind(**known)


def _fields(part: Any) -> dict[str, Any]:
    held = {field.name: getattr(part, field.name) for field in fields(part)}
    default = {field.name: field.default for field in fields(part) if field.default is not MISSING}
    return {name: _plain(value) for name, value in held.items() if name not in default or value != default[name]}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple(PARTS.values())):
        return _fields(value)
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _read(name: str, value: Any) -> Any:
    if name in PARTS:
        return [PARTS[name](**{key: _read(key, one) for key, one in part.items()}) for part in value]
    if name == "numbers":
        return frozenset(value)
    return [math.nan if one is None else one for one in value] if isinstance(value, list) else value


__all__ = ["FIGURES", "Measurement", "from_json", "read_measurement", "to_json", "write_measurement"]
