"""What is shown of a comparison, from probabilities that are made up."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser

import numpy as np
import pytest

from megapsft.errors import Refused
from megapsft.report.compare import figures, read_json, show_comparison, summary, write_json, write_page
from megapsft.report.dynamics import distance_grid, distances, dynamics
from megapsft.report.shifts import heat, last_of_each, shift_histogram, words
from megapsft.train.comparison import Comparison, Seen, by_word, to_json

EVIL = "<b>&[red]"


def seen(name, probabilities, **more) -> Seen:
    p = np.array(probabilities, dtype=float)
    given = {"entropy": np.full(len(p), 0.5), "ranks": np.where(p >= 0.5, 1, 2), "kl": p * 0 + 0.1, "kl_of_base": p * 0 + 0.2}
    return Seen(name=name, path=f"models/{name}", logprobs=np.log(p), **given | more)


@pytest.fixture
def made() -> Comparison:
    """Two responses, of four tokens and of two; `the` (1) stands in four places, `so` (2) in one, the third word in one."""
    base = seen("base", [0.5, 0.5, 0.5, 0.5, 0.5, 0.2], kl=None, kl_of_base=None)
    return Comparison(
        data="train.jsonl",
        sources=("train.jsonl:1", EVIL),
        lengths=(4, 2),
        token_ids=np.array([1, 1, 1, 2, 1, 3]),
        words={1: " the", 2: "so", 3: EVIL},
        base=base,
        tuned=(
            seen("psft", [0.5, 0.5, 0.5, 0.5, 0.5, 0.3]),
            seen("psft", [0.62, 0.62, 0.62, 0.93, 0.5, 0.2]),
            seen("sft", [0.9] * 6),
        ),
        references=(seen("teacher", [0.9] * 4 + [0.5, 0.2]),),
    )


def test_the_distance_is_a_mean_over_responses(made):
    """Of the second psft: in the first response 0.12 three times and 0.43 away from the base, in the second 0."""
    first, second, sft = made.tuned
    assert made.distance(second, made.base) == pytest.approx((0.79 / 4 + 0) / 2)
    assert made.distance(first, made.base) == pytest.approx((0 + 0.1 / 2) / 2)
    assert made.distance(second, made.references[0]) == pytest.approx((0.87 / 4 + 0) / 2)
    assert made.distance(sft, sft) == 0


def test_paths_begin_at_the_base(made):
    paths = distances(made)
    assert [len(path) for path in paths.values()] == [3, 2]
    assert [d for _, d in paths["psft"]] == [pytest.approx(d) for d in ([0, 0.2], [0.025, 0.225], [0.09875, 0.10875])]
    (chart,) = dynamics(made)
    psft, sft = chart.lines
    assert (psft.x, psft.y) == (pytest.approx([0, 0.025, 0.09875]), pytest.approx([0.2, 0.225, 0.10875]))
    assert (psft.name, sft.name) == ("psft", "sft")
    assert "to base" in chart.x_label
    assert "to teacher" in chart.y_label
    assert distance_grid(made).rows[0][2:] == ["0.00000", "0.20000"]


def test_without_references_distances_are_in_order(made):
    alone = dataclasses.replace(made, references=())
    (chart,) = dynamics(alone)
    assert [line.x for line in chart.lines] == [[0, 1, 2], [0, 1]]
    assert chart.lines[0].y == pytest.approx([0, 0.025, 0.09875])
    assert dynamics(dataclasses.replace(alone, tuned=alone.tuned[:1])) == []


def test_shifts(made):
    assert [one.name for one in last_of_each(made)] == ["psft", "sft"]
    shown = shift_histogram(made)
    psft = np.array(shown.series[0].values)
    found = {round(low, 2): share for low, share in zip(shown.edges, psft, strict=False) if share}
    assert found == {0.0: pytest.approx(100 * 2 / 6), 0.1: pytest.approx(100 * 3 / 6), 0.4: pytest.approx(100 / 6)}
    response = heat(made, made.tuned[1], 0, "heat")
    assert [token.text for token in response.tokens] == [" the", " the", " the", "so"]
    assert [token.value for token in response.tokens] == pytest.approx([0.12, 0.12, 0.12, 0.43])
    assert response.high == -response.low == pytest.approx(0.7)  # the largest of all models: sft's
    assert response.tokens[3].hover == "p 0.5 → 0.93, place 1 → 1, entropy 0.50 → 0.50 nats"


def test_words_do_not_win_by_their_number(made):
    means = [(word.text, word.count, word.mean) for word in by_word(made, made.shift(made.tuned[1]))]
    assert means == [(EVIL, 1, 0.0), (" the", 4, pytest.approx(0.09)), ("so", 1, pytest.approx(0.43))]
    assert words(made, made.tuned[1], "words").rows == [["gained", "␣the", "4", "+0.0900"]]  # the others have too few places


def test_the_summary(made):
    base, teacher, first, second, _ = summary(made)
    assert base == ["base", "base", f"{-np.log([0.5] * 5 + [0.2]).mean():.4f}", "0.5000", "83.3%", *"–" * 5]
    assert first[0] == "psft"
    assert second[5:] == ["0.10000", "0.20000", "66.7%", "66.7%", "0.0%"]
    assert teacher[-1] == "0.0%"


def test_the_table_is_printed(made, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    show_comparison(made)
    text = capsys.readouterr().out
    assert "6 tokens of 2 responses of train.jsonl" in text
    assert "|shift|>0.5" in text
    assert "+0.0900" in text


def test_the_page_needs_nothing_and_escapes(made, tmp_path):
    write_page(made, tmp_path / "made/compare.html")
    page = (tmp_path / "made/compare.html").read_text()
    assert EVIL not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page

    class Counted(HTMLParser):
        figures, images = 0, 0

        def handle_starttag(self, tag, attributes):
            self.figures += tag == "figure"
            self.images += dict(attributes).get("role") in ("img", "region")

    counted = Counted()
    counted.feed(page)
    assert counted.figures == counted.images == sum(map(len, figures(made).values())) == 11


def test_json_is_read_again(made, tmp_path):
    write_json(made, tmp_path / "compare.json")
    assert to_json(read_json(tmp_path / "compare.json")) == to_json(made)
    for text in ("[]", "{", '{"format": "another"}'):
        (tmp_path / "compare.json").write_text(text)
        with pytest.raises(Refused, match=r"compare\.json: is not"):
            read_json(tmp_path / "compare.json")
