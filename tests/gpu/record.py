"""A plugin of pytest that writes what each check found to a file: `-p tests.gpu.record --record FILE`.

A check says what it measured by pytest's `record_property(name, value)`, where the value can be written as JSON.
"""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_parts.lines import in_short
from benchmarks.gpu_parts.machine import machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, metavar="FILE", help="write outcome, seconds and measured numbers of each test")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record"):
        config.pluginmanager.register(Record(config.getoption("--record")))


class Record:
    """Every test that ran, or that could not be set up."""

    def __init__(self, file: Path):
        self.file = file
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        one = self.tests.setdefault(report.nodeid, {"name": report.nodeid, "outcome": "passed", "seconds": 0.0, "measured": {}})
        one["seconds"] += report.duration
        one["measured"].update(report.user_properties)
        if report.outcome != "passed":
            one |= {"outcome": report.outcome, "error": in_short(report.longreprtext[-400:])}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.tests[report.nodeid] = {
                "name": report.nodeid, "outcome": "failed", "seconds": 0.0, "measured": {},
                "error": in_short(str(report.longrepr)[-400:]),
            }  # fmt: skip

    def pytest_sessionfinish(self) -> None:
        result = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine("cuda" if torch.cuda.is_available() else "cpu"),
            "counts": dict(Counter(test["outcome"] for test in self.tests.values())),
            "tests": list(self.tests.values()),
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(result, indent=1) + "\n")
