"""Pages of results tell the figures that lie beside them, and the README those of the pages."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/results"
ENGINES = {"SGLang": "SGLang, a step ahead", "in process": "in process", "shuffled rewards": "shuffled rewards (control)"}


def stored(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["convert", "gsm8k", "head", "invariants", "rl", "rollout", "train_step"])
def test_a_page_is_of_the_day_of_its_figures(name):
    found = stored(name)
    page = (RESULTS / f"{name}.md").read_text()
    assert f"{name}.json" in page
    if isinstance(found, dict) and "date" in found:
        assert found["date"] in page


def test_the_tables_of_rollouts_are_what_the_benchmark_prints():
    spec = importlib.util.spec_from_file_location("benchmark_rollout_tables", ROOT / "benchmarks/rollout.py")
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = benchmark  # where dataclasses look
    spec.loader.exec_module(benchmark)
    del sys.modules[spec.name]
    page = (RESULTS / "rollout.md").read_text()
    for table in benchmark.tables(stored("rollout")).split("\n\n"):
        assert table in page


@pytest.mark.parametrize(("row", "run"), ENGINES.items())
def test_the_table_of_rl(row, run):
    found = stored("rl")["runs"][run]
    (line,) = [line for line in (RESULTS / "rl.md").read_text().splitlines() if line.startswith(f"| {row}")]
    first, last = (found["accuracy"][number] for number in (0, -1))
    cells = [f"{one['avg']:.3f} ± {one['standard_error']:.3f}" for one in (first, last)]
    cells += [f"{found['seconds_of_command'] / 60:.1f}"]
    cells += [f"{100 * found[key]:.0f} %" for key in ("share_of_rollouts", "share_of_weight_updates")]
    assert [cell.strip() for cell in line.split("|")[2:-1]] == cells


def test_the_readme_tells_the_same_of_rl():
    told = " ".join((ROOT / "README.md").read_text().split())
    for row in ("SGLang", "in process"):
        accuracy = stored("rl")["runs"][ENGINES[row]]["accuracy"]
        assert f"{accuracy[0]['avg']:.3f} to {accuracy[-1]['avg']:.3f} {'with ' * (row == 'SGLang')}{row}" in told


def test_the_table_of_evidence():
    found, page = stored("evidence"), (ROOT / "docs/evidence.md").read_text()
    assert found["made"]["date"] in page
    for letter, claim in found["claims"].items():
        numbers = "; ".join(f"{name}: {one['mean']:.3f} ± {one['half']:.3f}" for name, one in claim["decided_by"].items())
        assert f"| {letter} | {claim['outcome']} | {numbers} |" in page
