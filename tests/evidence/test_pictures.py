"""Figures, the page and the JSON, from results made by hand."""

import json
import re

import pytest

from evidence.claims import CLAIMS
from evidence.interval import interval
from evidence.page import SMALL, TITLE, claim_table, judge_all, method_table, rate_table, read_json, write_json, write_page
from evidence.pictures import accuracies, bars, curves, in_and_out
from evidence.results import at_the_end, final, mean_of
from megapsft.report.figure import Bars, Chart
from tests.evidence.made import SIZES, made

RESULTS = made({("psft", "out"): (0.1, 0.2, 0.3), ("sft", "entropy"): (0.21, 0.2, 0.19)})
PAIR = {"SFT": "sft", "PSFT": "psft"}


def ends(of):
    return of.mean, of.low, of.high


def test_a_curve_is_the_mean_over_seeds_over_samples():
    shown = curves(RESULTS, PAIR, "entropy", name="x", title="t", y_label="nats")
    assert [line.name for line in shown.lines] == ["SFT", "PSFT"]
    line = shown.lines[0]
    assert list(line.x) == [100 * step for step in range(1, 11)]  # 1000 samples in ten steps
    known = interval(run.curves["entropy"][3] for run in RESULTS["sft"].runs.values())
    assert (line.y[3], line.low[3], line.high[3]) == pytest.approx(ends(known))
    assert known.mean == pytest.approx(1.2, abs=0.01)


def test_accuracies_lie_where_they_were_measured():
    line = accuracies(RESULTS, PAIR, "out", name="x", title="t").lines[1]
    assert list(line.x) == [0, 500, 1000]
    assert line.y[:2] == pytest.approx([0.4, 0.45])
    assert line.y[2] == pytest.approx(0.7, abs=0.01)
    assert line.low[0] == line.high[0] == pytest.approx(0.4)
    assert line.dots


def test_bars_of_both_families():
    shown = in_and_out(RESULTS, PAIR, name="x", title="t")
    assert list(shown.names) == ["SFT", "PSFT"]
    assert [series.name for series in shown.series] == ["in-domain", "out of domain"]
    known = interval(run.accuracy["out"][-1] for run in RESULTS["psft"].runs.values())
    assert (shown.series[1].values[1], shown.series[1].errors[1]) == pytest.approx((known.mean, known.half))


def test_bars_of_one_number():
    shown = bars(RESULTS, PAIR, mean_of("gradient_norm"), name="x", title="t", y_label="norm")
    assert shown.series[0].values == pytest.approx([1, 1], abs=0.01)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.letter)
def test_figures_of_a_claim(claim):
    figures = claim.draw(RESULTS, SIZES)
    assert figures
    assert {figure.name.partition("-")[0] for figure in figures} == {claim.letter}
    for figure in figures:
        assert isinstance(figure, Chart | Bars)
        assert figure.title
        assert figure.x_label
        assert figure.y_label
        assert "nothing known" not in figure.words


def test_the_tables():
    verdicts = judge_all(RESULTS, SIZES)
    assert [row[0] for row in claim_table(verdicts).rows] == list("abcdefghi")
    assert {row[2] for row in claim_table(verdicts).rows} <= {"holds", "does not hold", "undecided"}
    shown = dict(zip(RESULTS, method_table(RESULTS).rows, strict=True))
    assert shown["sft"][1:4] == ("1,000", "0.001", "0.001: 0.500, 0.0012: 0.400")
    first, second = (row[1:] for row in rate_table(RESULTS).rows if row[0] == "sft")
    entropy = f"{at_the_end('entropy')(RESULTS['sft'].runs[1]):.3f}"
    assert first == ("0.001", "taken", "0.500", "0.500", "0.500", entropy)
    assert second == ("0.0012", "", "0.400", "0.400", "0.400", entropy)
    known = interval(final("out")(run) for run in RESULTS["psft"].runs.values())
    assert shown["psft"][5] == str(known)


def test_json_and_page(tmp_path):
    write_json(RESULTS, SIZES, tmp_path / "evidence.json")
    results, sizes, made = read_json(tmp_path / "evidence.json")
    assert (results, sizes) == (RESULTS, SIZES)
    assert {"date", "torch", "megatron-core"} <= set(made)
    tree = json.loads((tmp_path / "evidence.json").read_text())
    assert tree["claims"]["a"]["outcome"] == "does not hold"
    assert tree["claims"]["a"]["decided_by"]["PSFT - SFT"]["mean"] == pytest.approx(-0.2, abs=0.01)
    write_page(RESULTS, SIZES, made, tmp_path / "evidence.html")
    page = (tmp_path / "evidence.html").read_text()
    assert f"Written on {made['date']}, with Python" in page
    assert TITLE in page
    assert SMALL in page  # three seeds
    assert not re.search(r"(?:src|href)=.?https?:", page)
    for claim in CLAIMS:
        for figure in claim.draw(RESULTS, SIZES):
            assert f'id="figure-{figure.name}"' in page
    assert page.count("Here it") == len(CLAIMS)
