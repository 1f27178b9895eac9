"""What records of steps add up to, in tables, JSON and pictures. Not here: whether a picture is beautiful; look at it."""

import json
import struct

import pytest
from rich.console import Console

from megapsft import cli
from megapsft.errors import Refused
from megapsft.metrics.names import PARTS
from megapsft.report.step import BARS, COLOURS, bars, draw_steps, spent, step_table, write_spent


def record(step, seconds=2.0, **parts):
    found = {"step": step, "update": step, "phase": "train", "objective": "psft", "perf/seconds": seconds}
    found |= {"perf/tokens_per_second": 100.0 * step, "perf/tflops_per_device": 0.5, "perf/forward_backward_seconds": 1.0}
    return found | {f"perf/{name}_seconds": value for name, value in parts.items()}


RECORDS = [record(1), record(2, old_policy=0.5, checkpoint=0.25), record(3, seconds=4.0, evaluate=6.0, optimizer=0.5)]
WITHOUT_PARTS = {"step": 4, "update": 3, "phase": "train", "rollout/groups": 0.0}  # of a step that trained nothing


def test_parts_and_what_is_in_none_add_up_to_the_whole():
    found = spent([*RECORDS, WITHOUT_PARTS])
    assert found.steps == 3
    assert found.parts == {
        "forward_backward": 3.0, "old_policy": 0.5, "checkpoint": 0.25, "optimizer": 0.5, "evaluate": 6.0, "other": 3.75,
    }  # fmt: skip
    assert found.seconds == 14.0  # of training, and of the benchmarks, which perf/seconds does not count
    assert found.tokens_per_second == (100 * 2 + 200 * 2 + 300 * 4) / 8
    assert found.mfu is None


def test_what_came_after_the_last_record_is_added():
    found = spent(RECORDS, after={"checkpoint": 1.0})
    assert (found.parts["checkpoint"], found.seconds) == (1.25, 15.0)
    assert found.parts["other"] == 3.75


def test_mfu_where_all_steps_have_one():
    known = [one | {"perf/mfu": 0.1 * one["step"]} for one in RECORDS]
    assert spent(known).mfu == pytest.approx((0.1 * 2 + 0.2 * 2 + 0.3 * 4) / 8)
    assert spent([*known, record(4)]).mfu is None


def test_records_that_say_nothing_of_parts():
    assert spent([]) is None
    assert spent([WITHOUT_PARTS]) is None


def test_the_table(capsys):
    Console(width=80).print(step_table(spent(RECORDS), "runs/one"))
    said = capsys.readouterr().out
    assert "runs/one: where a step goes" in said
    rows = [line.split() for line in said.splitlines()]
    assert ["forward", "backward", "1.0000", "21.4%"] in rows
    assert ["whole", "4.6667"] in rows
    assert "225 tokens/s, 0.5 TFLOP/s a device" in said


def test_the_file_has_seconds_and_shares(tmp_path):
    write_spent(spent(RECORDS), tmp_path)
    found = json.loads((tmp_path / "time.json").read_text())
    assert found["parts"]["evaluate"] == {"seconds": 6.0, "share": pytest.approx(6 / 14)}
    assert [path.name for path in tmp_path.iterdir()] == ["time.json"]


def test_many_steps_share_a_bar():
    few, many = bars(RECORDS), bars([record(number) for number in range(1, 4 * BARS)])
    assert [bar["at"] for bar in few] == [1.0, 2.0, 3.0]
    assert few[2]["parts"]["evaluate"] == 6.0
    assert len(many) == BARS
    assert (many[0]["at"], many[0]["width"]) == (2.5, 3.9)
    assert many[0]["parts"] == {"forward_backward": 1.0, "other": 1.0}


def test_every_part_has_a_colour_of_its_own():
    assert set(COLOURS) == {*PARTS, "other"}
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_curves_draws_steps_beside(tmp_path, capsys):
    runs = []
    for name, records in (("one", RECORDS), ("old", [WITHOUT_PARTS])):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(json.dumps({"update": 1, "phase": "train", "objective": "sft"}) + "\n")
        (folder / "steps.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
        runs.append(str(folder))
    assert cli.main(["curves", *runs, "--out", str(tmp_path / "pictures/all.png")]) == 0
    assert capsys.readouterr().out.count("where a step goes") == 1  # the older run says nothing of it
    assert size(tmp_path / "pictures/all-step.png") == (1560, 546)
    assert cli.main(["curves", runs[1], "--out", str(tmp_path / "old.png")]) == 0
    assert not (tmp_path / "old-step.png").exists()


def test_nothing_to_draw_is_refused(tmp_path):
    (tmp_path / "steps.jsonl").write_text(json.dumps(WITHOUT_PARTS) + "\n")
    for runs in ({}, {"old": tmp_path}):
        with pytest.raises(Refused, match="needs runs whose steps.jsonl says what its parts took"):
            draw_steps(runs, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def size(png):
    """(width, height) out of the header of a PNG file."""
    return struct.unpack(">II", png.read_bytes()[16:24])
