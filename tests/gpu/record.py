"""A plugin of pytest that writes what each check found to a file, after each: `-p tests.gpu.record --record FILE`.

What the file has of other checks, of this day and machine, stays: all of them may take more than one command.
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

from benchmarks.gpu_parts.lines import without_folders
from benchmarks.gpu_parts.machine import alike, machine
from megapsft.output.whole import write_whole

MOST = 3000  # characters of an error, its last


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, metavar="FILE", help="write outcome, seconds and measured numbers of each test")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record"):
        config.pluginmanager.register(Record(config.getoption("--record")))


class Record:
    """Every test that ran, or that could not be set up."""

    def __init__(self, file: Path):
        self.file = file
        self.result: dict[str, Any] = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine("cuda" if torch.cuda.is_available() else "cpu"),
        }
        before = json.loads(file.read_text()) if file.exists() else {}
        here = before and before["date"] == self.result["date"] and alike(before["machine"], self.result["machine"])
        self.tests: dict[str, dict[str, Any]] = {test["name"]: test for test in before["tests"]} if here else {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "setup":
            self.tests[report.nodeid] = {"name": report.nodeid, "outcome": "passed", "seconds": 0.0, "measured": {}}
        one = self.tests[report.nodeid]
        one["seconds"] += report.duration
        one["measured"].update(report.user_properties)
        if report.outcome != "passed":
            one |= {"outcome": report.outcome, "error": without_folders(report.longreprtext[-MOST:])}
        if report.when == "teardown":
            self.write()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.tests[report.nodeid] = {
                "name": report.nodeid, "outcome": "failed", "seconds": 0.0, "measured": {},
                "error": without_folders(str(report.longrepr)[-MOST:]),
            }  # fmt: skip
            self.write()

    def write(self) -> None:
        """Whole, or not at all."""
        counts = dict(Counter(test["outcome"] for test in self.tests.values()))
        write_whole(self.file, json.dumps(self.result | {"counts": counts, "tests": list(self.tests.values())}, indent=1) + "\n")
