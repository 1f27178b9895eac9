"""TensorBoard, by its own reader."""

import numpy as np
import pytest
from PIL import Image

from megapsft.metrics.shown import Picture, Table
from megapsft.metrics.tensorboard import TensorBoard
from tests.metrics.pages import events, texts


@pytest.fixture
def shown(tmp_path):
    Image.fromarray(np.full((4, 6, 3), 200, dtype=np.uint8)).save(tmp_path / "curves.png")
    return [Picture("curves", tmp_path / "curves.png"), Table("phases", ("phase", "nll"), [("train", "0.5")])]


def test_pictures_are_images_and_tables_are_texts(tmp_path, shown):
    tracker = TensorBoard(tmp_path / "events")
    tracker.show(shown, 3)
    tracker.close()
    found = events(tmp_path / "events")
    (image,) = found.Images("pictures/curves")
    assert (image.step, image.height, image.width) == (3, 4, 6)
    assert texts(tmp_path / "events", "tables/phases") == [(3, "| phase | nll |\n| --- | ---: |\n| train | 0.5 |\n")]


@pytest.mark.parametrize(("resumed_at", "kept"), [(1, [0, 1]), (0, [])])
def test_what_comes_again_is_there_once(tmp_path, shown, resumed_at, kept):
    """Of a run that was killed after update 2; benchmarks before the first update come again where it begins anew."""
    for first in (True, False):
        tracker = TensorBoard(tmp_path, resumed_at=0 if first else resumed_at)
        for update in range(3):
            if first or update not in kept:
                tracker.write({"train/loss": float(first)}, update)
                tracker.show(shown, update)
        tracker.close()
    found = events(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [(u, float(u in kept)) for u in range(3)]
    assert [e.step for e in found.Images("pictures/curves")] == [0, 1, 2]
    assert [step for step, _ in texts(tmp_path, "tables/phases")] == [0, 1, 2]
