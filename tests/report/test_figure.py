"""Figures in words, as SVG, HTML and PNG, from numbers that are made up. Not here: whether they are beautiful; look at them."""

from __future__ import annotations

import io
import math
import re
from xml.etree import ElementTree

import pytest

from megapsft.report.axis import axis_of, thinned, written
from megapsft.report.figure import Bars, Chart, Cloud, Grid, Heat, Histogram, Line, Mark, Series, Span, Switched, Token
from megapsft.report.html import figure
from megapsft.report.png import write_png
from megapsft.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, drawing

NAN = math.nan
EVIL = "<script>alert('&\"')</script>"


def chart(*lines: Line, **options) -> Chart:
    return Chart(name="nll", title="Likelihood", x_label="updates", y_label="nats", lines=lines, **options)


def line(y, **options) -> Line:
    return Line(**{"name": "psft", "x": range(1, len(y) + 1), "y": y} | options)


def parsed(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(re.sub(r"<(\w+) class=number>", r'<\1 class="number">', markup).replace(" >", ">"))


def paths(shown: Chart, kind: str) -> list[list[tuple[float, float]]]:
    """The points of the paths of a class."""
    found = [path.get("d") for path in parsed(drawing(shown)).iter("path") if kind in path.get("class").split()]
    return [[tuple(map(float, point.split(","))) for point in d.strip("Mz").split()] for d in found]


def test_a_chart_in_words():
    words = chart(line([3.0, NAN, 1.0, 2.0]), marks=[Mark(2, "epoch 1")], spans=[Span(1, 2, "warm-up")]).words
    assert words == ("nats over updates. psft: 3 at 1, 2 at 4, lowest 1 at 3, highest 3 at 1. epoch 1 at 2; warm-up from 1 to 2")
    assert line([NAN]).words == "psft: nothing known"
    assert line([0.5]).words == "psft: 0.5 at 1"


def test_bars_a_text_and_a_cloud_in_words():
    bars = Bars(name="a", title="a", x_label="part", y_label="s", names=["x", "y"], series=[Series(name="one", values=[1, NAN])])
    assert bars.words == "s by part. one: x 1"
    many = Series(name="one", values=range(20))
    assert "and 8 smaller" in many.words([str(number) for number in range(20)])
    heat = Heat(name="a", title="a", unit="shift", low=-1, high=1, tokens=[Token("x", -1.0), Token("y", 2.0), Token("z", NAN)])
    assert heat.words == "shift of 2 tokens: mean 0.5, lowest -1 of 'x', highest 2 of 'y'"
    assert Cloud(name="a", title="a", unit="times", tokens=[Token("x", 1), Token("y", 2)]).words == "times: 'y' 2, 'x' 1"


@pytest.mark.parametrize(
    "build",
    [
        lambda: line([1.0], x=[1, 2]),
        lambda: line([1.0], low=[1.0, 2.0], high=[1.0]),
        lambda: Histogram(name="a", title="a", x_label="", y_label="", edges=[0, 1], series=[Series(name="b", values=[1, 2])]),
        lambda: Bars(name="a", title="a", x_label="", y_label="", names=["x"], series=[Series(name="b", values=[])]),
        lambda: Bars(
            name="a", title="a", x_label="", y_label="", names=["x"], series=[Series(name="b", values=[-1.0])], stacked=True
        ),
        lambda: Grid(name="a", title="a", heading=["x"], rows=[["1", "2"]]),
    ],
)
def test_what_does_not_fit_together_is_refused(build):
    with pytest.raises(ValueError, match=r"\d"):
        build()


def test_points_lie_where_their_numbers_are():
    (points,) = paths(chart(line([0.0, 5.0, 10.0])), "line")
    floor, top = HEIGHT - BOTTOM, TOP + (HEIGHT - TOP - BOTTOM) * 0.5 / 10.5  # a twentieth of room above
    assert points[0] == (LEFT, floor)
    assert points[2] == pytest.approx((WIDTH - RIGHT, top), abs=0.06)
    assert points[1][1] == pytest.approx((floor + top) / 2, abs=0.06)


def test_equal_ratios_are_equal_distances_on_a_logarithmic_axis_and_zero_is_a_gap():
    first, second = paths(chart(line([1e-3, 1e-1, 0.0, 1e-3, 10.0]), log_y=True), "line")
    assert 2 * (first[0][1] - first[1][1]) == pytest.approx(second[0][1] - second[1][1], abs=0.3)


def test_gaps_and_points_that_stand_alone():
    shown = chart(line([1.0, 2.0, NAN, 3.0, NAN, 4.0, 5.0]))
    assert [len(points) for points in paths(shown, "line")] == [2, 2]
    dots = [circle for circle in parsed(drawing(shown)).iter("circle") if circle.get("class") == "dot"]
    assert len(dots) == 1
    assert "nan" not in drawing(shown).replace("nats", "")


def test_bands_error_bars_marks_and_spans_are_drawn():
    ends = {"low": [0.0, 1.0], "high": [2.0, 3.0]}
    assert len(paths(chart(line([1.0, 2.0], **ends)), "band")[0]) == 4
    assert drawing(chart(line([1.0, 2.0], dots=True, **ends))).count('class="error"') == 2
    marked = drawing(chart(line([1.0, 2.0]), marks=[Mark(1.5, "epoch 1", 2)], spans=[Span(1, 1.5, "warm-up")]))
    assert all(found in marked for found in ('<g class="c2">', 'class="mark"', ">epoch 1</text>", 'class="span"', "warm-up"))


@pytest.mark.parametrize(("low", "high"), [(0, 10), (0.37, 0.41), (-3, 1e-9), (1e-7, 3e-7), (5, 50_000), (0.999, 1.0)])
def test_ticks_are_few_round_and_inside(low, high):
    for log in (False, low > 0):
        ticks = axis_of([low, high], log=log).ticks
        assert 3 <= len(ticks) <= 10
        assert all(len(f"{tick:.6g}".replace("-", "").replace(".", "").strip("0").split("e")[0]) <= 4 for tick in ticks)
        axis = axis_of([low, high], log=log)
        assert all(-1e-6 <= axis.at(tick) <= 1 + 1e-6 for tick in ticks)
        assert 0 <= axis.at(low) < axis.at(high) <= 1


def test_axes_of_almost_nothing():
    assert axis_of([]).ticks
    assert axis_of([2.0, 2.0]).at(2.0) == pytest.approx(0.5, abs=0.4)
    assert axis_of([NAN, -1.0, 0.0], log=True).log is False


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1500, "1,500"), (2_500_000, "2.5M"), (1e-5, "1e-5"), (0.0005, "0.0005"), (-0.25, "-0.25"), (150_000, "150k")],
)
def test_numbers_are_short(value, text):
    assert written(value) == text


def test_thinning_keeps_extremes_gaps_and_ends():
    y = [math.sin(number / 50) for number in range(10_000)]
    y[1234], y[4321], y[7000] = 50.0, -50.0, NAN
    kept = thinned(y)
    assert len(kept) <= 602
    assert {0, 1234, 4321, 7000, 9999} <= set(kept)
    assert kept == sorted(set(kept))
    assert thinned([1.0, 2.0]) == [0, 1]


def test_the_page_has_titles_keys_units_and_words():
    shown = chart(line([1.0, 2.0]), line([2.0, 1.0], name="sft", colour=1), note="Lower is better.")
    found = parsed(figure(shown))
    assert found.find("figcaption").text == "Likelihood"
    assert [item[0].tail for item in found.find("ul")] == ["psft", "sft"]
    svg = found.find("svg")
    assert svg.get("role") == "img"
    assert svg.get("aria-label").startswith("Likelihood. nats over updates. psft: 1 at 1")
    assert {"updates", "nats"} <= {text.text for text in svg.iter("text")}
    assert found.find("p").text == "Lower is better."


def test_all_axes_of_a_switched_chart_are_there():
    found = parsed(figure(Switched(charts={"update": chart(line([1.0])), "step": chart(line([2.0]))})))
    assert [div.get("class") for div in found.iter("div")] == ["overs", "over over-update", "over over-step"]
    assert len(list(found.iter("svg"))) == 2


def test_columns_and_outlines():
    options = {"name": "p", "title": "p", "x_label": "probability", "y_label": "tokens", "edges": [0, 0.5, 1]}
    one = parsed(drawing(Histogram(series=[Series(name="a", values=[1, 2])], **options)))
    low, high = (float(bar.get("height")) for bar in one.iter("rect"))
    assert high == pytest.approx(2 * low, abs=0.2)
    two = drawing(Histogram(series=[Series(name="a", values=[1, 2]), Series(name="b", values=[2, 1], colour=1)], **options))
    assert two.count('class="line"') == 2
    assert "<rect" not in two


def test_bars_are_as_long_as_their_numbers():
    series = [Series(name="a", values=[1.0, 3.0]), Series(name="b", values=[1.0, 1.0], tint="#123456")]
    options = {"name": "t", "title": "t", "x_label": "run", "y_label": "s", "names": ["x", "y"]}
    widths = [float(bar.get("width")) for bar in parsed(drawing(Bars(series=series, **options))).iter("rect")]
    assert widths == pytest.approx([widths[0], widths[0], 3 * widths[0], widths[0]], abs=0.2)
    stacked = list(parsed(drawing(Bars(series=series, stacked=True, **options))).iter("rect"))
    assert float(stacked[3].get("x")) == pytest.approx(float(stacked[2].get("x")) + float(stacked[2].get("width")), abs=0.2)
    assert "--c:#123456" in drawing(Bars(series=series, **options))
    below = list(parsed(drawing(Bars(series=[Series(name="a", values=[-1.0, 3.0])], **options))).iter("rect"))
    assert float(below[0].get("x")) + float(below[0].get("width")) == pytest.approx(float(below[1].get("x")), abs=0.2)


def test_a_heat_a_cloud_and_a_table():
    heat = figure(Heat(name="h", title="h", unit="shift (nats)", low=-2, high=1, tokens=[Token("a", -1.0), Token("b", 3.0)]))
    assert re.search(r'class="below" style="--part:50%" title="-1">a<', heat)
    assert re.search(r'class="above" style="--part:100%" title="3">b<', heat)
    cloud = figure(Cloud(name="c", title="c", unit="times", tokens=[Token("a", 4), Token("b", 1), Token("c", 0)]))
    assert [float(size) for size in re.findall(r"font-size:([\d.]+)em", cloud)] == [2.6, 1.65]
    table = figure(Grid(name="g", title="g", heading=["run", "nll"], rows=[["a", "1"]], numbers=frozenset({1})))
    assert "<td class=number>1</td>" in table


def test_what_users_wrote_is_escaped():
    shown = [
        chart(line([1.0, 2.0], name=EVIL), line([1.0, 2.0], name=EVIL), marks=[Mark(1, EVIL)], spans=[Span(1, 2, EVIL)]),
        Histogram(name="a", title=EVIL, x_label=EVIL, y_label=EVIL, edges=[0, 1], series=[Series(name=EVIL, values=[1])]),
        Bars(name="a", title=EVIL, x_label=EVIL, y_label=EVIL, names=[EVIL], series=[Series(name=EVIL, values=[1])] * 2),
        Heat(name="a", title=EVIL, unit=EVIL, low=-1, high=1, tokens=[Token(EVIL, 0.5, EVIL)], note=EVIL),
        Cloud(name="a", title=EVIL, unit=EVIL, tokens=[Token(EVIL, 0.5, EVIL)]),
        Grid(name="a", title=EVIL, heading=[EVIL], rows=[[EVIL]]),
    ]
    for one in shown:
        assert "<script" not in figure(one)
        parsed(figure(one))


def test_the_same_figures_as_png():
    shown = [
        chart(line([1.0, NAN, 3.0], low=[0.0, 1.0, 2.0], high=[2.0, 3.0, 4.0]), marks=[Mark(2, "epoch 1")]),
        chart(line([1.0, 3.0], dots=True, low=[0.0, 1.0], high=[2.0, 4.0], dashed=True), log_y=True),
        Histogram(name="a", title="a", x_label="x", y_label="y", edges=[0, 1, 2], series=[Series(name="a", values=[1, 2])]),
        Bars(name="a", title="a", x_label="x", y_label="y", names=["x"], series=[Series(name="a", values=[1], errors=[0.5])]),
    ]
    file = io.BytesIO()
    write_png(shown, file)
    assert file.getvalue()[:8] == b"\x89PNG\r\n\x1a\n"
