"""What was asked of the runs: the keys in which their configs differ, of one run those that are not the defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from megapsft.config import flatten, load_config
from megapsft.report.figure import Grid
from megapsft.report.folders import Shown
from megapsft.report.run import Run
from megapsft.report.section import Section

FOLDERS = ("run.dir", "model.path", "data.path", "checkpoint.resume")  # that tell where a run lies more than what it is
MISSING = "–"


def section(shown: Shown) -> Section | None:
    known = [run for run in shown.runs if run.config]
    if not known:
        return None
    names = [run.name for run in known]
    if len(known) > 1:
        told = differences([run.config for run in known])
        title, heading = "Keys in which the runs differ", ["key", *names]
    else:
        told = not_default(known[0])
        title, heading = f"Keys of {names[0]} that are not the defaults", ["key", "value", "default"]
    split = [{key: row for key, row in told.items() if (key in FOLDERS) is among} for among in (False, True)]
    grids = [
        Grid(name=name, title=title, heading=heading, rows=[[key, *row] for key, row in rows.items()])
        for name, title, rows in (("config", title, split[0]), ("config-folders", "Where they lie", split[1]))
        if rows
    ]
    note = "" if grids else "The configs of the runs are the same."
    return Section(name="Configs", figures=grids, note=note)


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Key -> its value in each config, as YAML would have it on a line, of the keys that differ, in their order."""
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = {key: [_text(config[key]) if key in config else MISSING for config in configs] for key in keys}
    return {key: row for key, row in rows.items() if len(set(row)) > 1}


def not_default(run: Run) -> dict[str, list[str]]:
    """Key -> its value and the default, of the same objective."""
    name = run.config.get("objective.name")
    defaults = flatten(load_config(None, [f"objective.name={name}"] if name else []))
    return {key: row for key, row in differences([run.config, defaults]).items() if key in run.config}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


__all__ = ["differences", "section"]
