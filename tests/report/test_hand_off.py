"""The hand-off table of a pipeline from rows that are made up. Not here: what the rows say (tests/pipeline)."""

from __future__ import annotations

import json

from megapsft.report.hand_off import hand_off_of, show_hand_off, write_hand_off


def row(stage: str, benchmark: str, **other: float | None) -> dict:
    plain = {"stage": stage, "benchmark": benchmark, "problems": 12, "n": 4, "avg": 0.5, "avg_se": 0.125, "pass@10": 0.75,
             "pass@10_se": 0.0625, "pass@2": 0.625, "pass@2_se": 0.03125, "length": 14.25, "entropy": 0.5, "kl_k1": 0.25,
             "kl_k3": 0.125}  # fmt: skip
    return plain | other


ROWS = [row("start", "easy"), row("start", "hard", avg_se=None), row("psft", "easy", avg=0.75), row("psft", "hard")]


def test_percent_with_errors_and_nats():
    heading, _, start, of_one_problem, *_ = hand_off_of(ROWS).markdown().splitlines()
    assert heading == (
        "| stage | benchmark | problems | n | avg@n | pass@2 | pass@10 | length | entropy | KL (k1) | KL (k3) |"
    )  # fmt: skip
    assert start == (
        "| start | easy | 12 | 4 | 50.00 ± 12.50 | 62.50 ± 3.12 | 75.00 ± 6.25 | 14.2 | 0.5000 | 0.2500 | 0.1250 |"
    )  # fmt: skip
    assert "| 50.00 | 62.50" in of_one_problem  # nothing is known of others


def test_a_pass_that_one_benchmark_has_not_is_no_number():
    short = {key: value for key, value in row("start", "short").items() if not key.startswith("pass@10")}
    assert "| 62.50 ± 3.12 | – | 14.2 |" in hand_off_of([*ROWS, short]).markdown()


def test_all_three_files_are_written_and_nothing_beside_them(tmp_path):
    write_hand_off(ROWS, tmp_path / "run")
    write_hand_off(ROWS, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["hand-off.json", "hand-off.md", "hand-off.png"]
    assert json.loads((tmp_path / "run/hand-off.json").read_text()) == ROWS
    assert (tmp_path / "run/hand-off.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_shows_what_there_is(tmp_path):
    """Other numbers make another picture; without pass@k a panel is left empty."""
    pictures = []
    for number, rows in enumerate((ROWS, [*ROWS[:3], row("psft", "hard", kl_k3=0.5)], [without_passes(one) for one in ROWS])):
        write_hand_off(rows, tmp_path / str(number))
        pictures.append((tmp_path / str(number) / "hand-off.png").read_bytes())
    assert len(set(pictures)) == 3


def without_passes(one: dict) -> dict:
    return {key: value for key, value in one.items() if not key.startswith("pass@")}


def test_the_table_is_as_wide_as_it_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    show_hand_off(ROWS)
    printed = capsys.readouterr().out
    assert "50.00 ± 12.50" in printed
    assert "KL (k3)" in printed
