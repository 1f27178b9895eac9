"""The benchmark of the head runs, and what it says is what it measured. Not here: its figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from megapsft.report.stored import read_measurement

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "head.py"


def test_measures_all_that_are_installed_and_draws(tmp_path):
    command = [sys.executable, str(BENCHMARK), "--quick", "--out", str(tmp_path / "head")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "head.json").read_text())
    assert {"plain", "ours"} <= set(found["implementations"])
    assert set(found["implementations"]) | set(found["not_installed"]) == {"plain", "ours", "trl"}
    for name, row in found["implementations"].items():
        assert row["seconds"][0] > 0
        assert list(found["peak_bytes_by_tokens"][name]) == ["128", "256", "512"]
    assert found["implementations"]["plain"]["time_over_plain"] == 1.0
    assert found["implementations"]["ours"]["peak_bytes"][0] < found["implementations"]["plain"]["peak_bytes"][0]
    assert (tmp_path / "head.png").stat().st_size > 5_000
    time, memory, over_tokens = read_measurement(tmp_path / "head.json").figures
    assert dict(zip(time.names, time.series[0].values, strict=True))["plain"] == 1.0
    assert dict(zip(memory.names, memory.series[0].values, strict=True))["ours"] < 1.0
    assert over_tokens.lines[0].x == [128, 256, 512]
