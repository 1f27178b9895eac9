"""Figures of benchmarks: from their files as they were written, drawn, on the page, and refused where they cannot be."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megapsft.errors import Refused
from megapsft.report.figure import Bars, Chart, Grid, Histogram, Line, Mark, Series, Span
from megapsft.report.folders import read_folders
from megapsft.report.page import page
from megapsft.report.stored import from_json, read_measurement, to_json, write_measurement

RESULTS = Path(__file__).parents[2] / "docs" / "results"
CHART = Chart(
    name="speed", title="speed", x_label="nodes", y_label="tokens/s", log_x=True, marks=[Mark(2.0, "limit")],
    lines=[Line(name="ours", x=[1, 2, 4], y=[1.0, 1.5, 2.5], low=[0.5, 1.0, 2.0], high=[2.0, 2.0, 3.0], colour=None, dots=True)],
    spans=[Span(1.0, 2.0, "warm-up")],
)  # fmt: skip
FIGURES = [
    CHART,
    Bars(name="bars", title="bars", x_label="what", y_label="GB", names=["a", "b"], series=[Series(name="GB", values=[1.0, 2])]),
    Grid(name="grid", title="grid", heading=["a", "b"], rows=[["x", "1"]], numbers=frozenset({1}), note="as it is"),
    Histogram(name="many", title="many", x_label="nats", y_label="tokens", edges=[0.0, 1.0, 2.0],
              series=[Series(name="ours", values=[3, 4])], limits=[Mark(1.0, "limit", 2)]),
]  # fmt: skip


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: type(figure).__name__)
def test_a_figure_is_read_as_it_was_written(figure):
    assert from_json(json.loads(json.dumps(to_json(figure)))) == figure


def test_a_number_that_is_not_known_is_null():
    line = Line(name="ours", x=[1, 2], y=[math.nan, 2.0])
    record = to_json(Chart(name="c", title="c", x_label="x", y_label="y", lines=[line]))
    assert json.dumps(record, allow_nan=False).count("null") == 1
    (read,) = from_json(record).lines
    assert math.isnan(read.y[0])
    assert read.y[1] == 2.0


def test_a_benchmark_is_a_section_of_the_page(tmp_path):
    measured = {"benchmark": "speed of it", "date": "2026-11-22", "machine": {"cpus": 2}, "raw": [1, 2]}
    write_measurement(measured, FIGURES, tmp_path / "new/speed.json", tmp_path / "new/speed.png")
    assert (tmp_path / "new/speed.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "new/speed.json").read_text())["raw"] == [1, 2]
    shown = page(read_folders([tmp_path / "new/speed.json"]))
    assert 'id="measurements"' in shown
    assert "speed.json, 2026-11-22, 2 cores." in shown
    for figure in FIGURES:
        assert f"<figcaption>speed of it: {figure.title}</figcaption>" in shown
    assert "2.5 at 4" in shown


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("{", "is not JSON"),
        ("[]", "is not of a benchmark"),
        ('{"raw": 1}', "it has no list of pictures"),
        ('{"pictures": [{"kind": "pie"}]}', "cannot be drawn"),
        ('{"pictures": [{"kind": "bars", "name": "bars"}]}', "cannot be drawn"),
        ('{"pictures": [{"kind": "bars", "series": 1}]}', "cannot be drawn"),
    ],
)
def test_what_is_refused(content, rule, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(Refused, match=rule):
        read_folders([tmp_path / "a.json"])


@pytest.mark.parametrize("name", ["convert", "head", "rl", "rollout"])
def test_the_results_that_are_shipped_have_their_figures(name):
    measured = read_measurement(RESULTS / f"{name}.json")
    assert measured.name == name
    assert measured.figures
    assert (RESULTS / f"{name}.png").is_file()
