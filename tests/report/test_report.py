"""Pictures and tables from records. Not here: whether a picture is beautiful; look at it."""

import io
import json
import struct
import warnings

import pytest
from rich.console import Console

from megapsft.errors import Refused
from megapsft.report.curves import draw_curves
from megapsft.report.phases import phases
from megapsft.report.table import phase_table


def record(update, **changes):
    return {
        "update": update,
        "step": update,
        "phase": "train",
        "objective": "psft",
        "train/loss": -1.0 - update / 100,
        "train/grad_norm": 1.0 / update,
        "train/lr": 1e-6,
        "train/skipped_updates": 0,
        "policy/entropy": 0.5,
        "objective/nll": 2.0 / update,
        "objective/clip_fraction": 0.1 * update,
        "objective/ratio_max": 1.0 + update,
    } | changes


WARMUP = {"phase": "warmup", "objective": "sft", "train/loss": 1.5, "objective/clip_fraction": 0.0, "objective/ratio_max": 1.0}
RUN = [record(1, **WARMUP), record(2, **WARMUP), record(3), record(4), record(5, **{"train/skipped_updates": 1})]


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def rows(path):
    return [list(cells) for cells in zip(*(column.cells for column in phase_table(path).columns), strict=True)]


def size(png):
    """(width, height) out of the header of a PNG file."""
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_cuts_where_the_phase_changes():
    assert [(phase.title, len(phase.records)) for phase in phases(RUN)] == [("warm-up (SFT)", 2), ("train (PSFT)", 3)]


def test_one_row_a_phase(tmp_path):
    assert rows(write(tmp_path / "metrics.jsonl", RUN)) == [
        ["warm-up (SFT)", "2", "1.500→1.500", "2.000→1.000", "0.500→0.500", "0.000"],
        ["train (PSFT)", "3 (1 skipped)", "-1.030→-1.050", "0.667→0.400", "0.500→0.500", "0.400"],
    ]


def test_a_table_without_some_numbers(tmp_path):
    (row,) = rows(write(tmp_path / "metrics.jsonl", [{"update": 1, "phase": "train", "objective": "sft", "train/loss": None}]))
    assert row == ["train (SFT)", "1", "–", "–", "–", "–"]


def test_the_table_fits_a_terminal_of_80_columns(tmp_path):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(phase_table(write(tmp_path / "metrics.jsonl", RUN[:4])))
    assert "-1.030→-1.040  0.667→0.500  0.500→0.500" in console.export_text()


def test_draws_one_run_and_several(tmp_path):
    one = write(tmp_path / "one.jsonl", RUN)
    two = write(tmp_path / "two.jsonl", [record(u, phase="train", objective="sft") for u in range(1, 9)])
    draw_curves({"PSFT": one}, tmp_path / "pictures" / "one.png")
    draw_curves({"PSFT": one, "SFT": two}, tmp_path / "pictures" / "two.png")
    assert size(tmp_path / "pictures" / "one.png") == size(tmp_path / "pictures" / "two.png") == (1950, 1040)
    assert (tmp_path / "pictures" / "one.png").read_bytes() != (tmp_path / "pictures" / "two.png").read_bytes()


@pytest.mark.parametrize(
    "records",
    [
        [record(1)],
        [record(1, **{"train/lr": 0.0, "train/grad_norm": None}), record(2, **{"train/lr": 0.0, "train/grad_norm": None})],
        [{"update": 3, "phase": "warmup", "objective": "sft", "train/loss": 1.0}],
    ],
    ids=["one update", "nothing above zero on a logarithmic axis", "almost nothing recorded"],
)
def test_draws_runs_that_have_little_to_show(tmp_path, records):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_curves({"run": write(tmp_path / "metrics.jsonl", records)}, tmp_path / "out.png")
    assert size(tmp_path / "out.png") == (1950, 1040)


def test_nothing_to_show_is_refused(tmp_path):
    empty = write(tmp_path / "metrics.jsonl", [])
    for call in (lambda: draw_curves({}, tmp_path / "x.png"), lambda: draw_curves({"a": empty}, tmp_path / "x.png")):
        with pytest.raises(Refused):
            call()
    with pytest.raises(Refused, match="has no records"):
        phase_table(empty)
    assert not (tmp_path / "x.png").exists()
