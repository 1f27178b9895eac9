"""Weights & Biases offline, from its own files. Not here: online, which needs an account."""

import json
import time

import numpy as np
from PIL import Image

from megapsft.metrics.shown import Picture, Table
from megapsft.metrics.weights_and_biases import WandB
from tests.metrics.pages import rows


def test_one_page_of_a_run_that_goes_on_twice(tmp_path):
    """Stopped after update 2 and gone on; killed after update 4, when the last checkpoint was that of update 3."""
    Image.fromarray(np.full((4, 6, 3), 200, dtype=np.uint8)).save(tmp_path / "curves.png")
    shown = [Picture("curves", tmp_path / "curves.png"), Table("phases", ("phase", "nll"), [("train", "0.5")])]
    notes = []
    for resumed_at, updates in ((0, (0, 1, 2)), (2, (3, 4)), (3, (4, 5))):
        tracker = WandB(tmp_path, project="test", mode="offline", resumed_at=resumed_at, config={"train.steps": 5})
        notes.append(tracker.note)
        for update in updates:
            tracker.write({"train/loss": 0.25}, update)
        tracker.write({"evaluate/sums/avg": 0.5}, updates[-1])
        tracker.show(shown, updates[-1])
        tracker.close()
        time.sleep(1.1)  # folders are named by the second
    assert notes[:2] == [None, None]
    assert "up to update 4" in notes[2]

    page = (tmp_path / "wandb_id").read_text()
    logs = sorted(tmp_path.glob(f"wandb/offline-run-*-{page}/run-{page}.wandb"))
    assert len(logs) == 3
    found = [row for log in logs for row in rows(log)]
    assert [int(row["_step"]) for row in found] == list(range(12))  # no folder begins where another did
    assert [int(row["update"]) for row in found if "train/loss" in row] == [0, 1, 2, 3, 4, 5]
    assert [int(row["update"]) for row in found if "evaluate/sums/avg" in row] == [2, 4, 5]
    pictures = [row for row in found if "pictures/curves/path" in row]
    assert [int(row["update"]) for row in pictures] == [2, 4, 5]
    for log, row in zip(logs, pictures, strict=True):
        image, table = (log.parent / "files" / json.loads(row[f"{name}/path"]) for name in ("pictures/curves", "tables/phases"))
        assert image.read_bytes() == (tmp_path / "curves.png").read_bytes()
        assert json.loads(table.read_text()) == {"columns": ["phase", "nll"], "data": [["train", "0.5"]]}


def test_without_its_name_another_page_begins(tmp_path):
    (tmp_path / "wandb_sent.json").write_text('{"rows": 7, "update": 3}\n')
    tracker = WandB(tmp_path, project="test", mode="offline", resumed_at=1)
    assert tracker.note is None
    tracker.write({"train/loss": 0.25}, 2)
    tracker.close()
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert [(row["_step"], row["update"]) for row in rows(log)] == [("0", "2")]
