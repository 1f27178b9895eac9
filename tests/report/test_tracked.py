"""What trackers show of a run, from records that are made up. Not here: how a tracker takes it (tests/metrics)."""

import json

import pytest
from PIL import Image

from megapsft.metrics.shown import Picture, Table
from megapsft.report import tracked as module
from megapsft.report.tracked import tracked

UPDATE = {"update": 1, "step": 1, "phase": "train", "objective": "psft", "train/loss": -1.0, "objective/nll": 0.5,
          "policy/entropy": 1.5, "objective/clip_fraction": 0.25, "train/skipped_updates": 0}  # fmt: skip
STEP = {"update": 1, "step": 1, "perf/seconds": 2.0, "perf/forward_backward_seconds": 1.5, "perf/tokens_per_second": 10.0,
        "perf/tflops_per_device": 0.5}  # fmt: skip
EVALUATION = {"update": 1, "step": 1, "evaluate/sums/avg": 0.5, "evaluate/sums/avg_se": 0.125, "evaluate/sums/pass@1": 0.5,
              "evaluate/sums/pass@1_se": None, "evaluate/sums/length": 12.0, "evaluate/sums/unfinished": 0.25}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    for name, records in {"metrics": [UPDATE], "steps": [STEP], "evaluations": [EVALUATION]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def test_tables_and_pictures_of_all_that_is_known(run):
    found = tracked(run)
    tables = {one.name: one for one in found if isinstance(one, Table)}
    assert tables["phases"].rows == [("train (PSFT)", "1", "-1.000→-1.000", "0.500→0.500", "1.500→1.500", "0.250")]
    assert tables["step"].rows[0] == ("forward backward", "1.5000", "75.0%")
    assert tables["evaluations"].rows == [("1", "sums", "50.00 ± 12.50", "pass@1 50.00", "12.0", "25.0%")]
    pictures = {one.name: one.png for one in found if isinstance(one, Picture)}
    assert list(pictures) == ["curves", "step", "evaluations"]
    for png in pictures.values():
        with Image.open(png) as image:
            assert len(image.convert("RGB").getcolors(1 << 20)) > 20


def test_nothing_yet_shows_nothing(run):
    for name in ("metrics", "steps", "evaluations"):
        (run / f"{name}.jsonl").write_text("")
    assert tracked(run) == []


def test_tables_alone_where_nothing_can_be_drawn(run, monkeypatch):
    monkeypatch.setattr(module, "has_matplotlib", lambda: False)
    assert {type(one) for one in tracked(run)} == {Table}
    assert not (run / "pictures").exists()
