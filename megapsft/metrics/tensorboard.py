"""TensorBoard: scalars, images and texts in event files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megapsft.errors import Refused
from megapsft.metrics.shown import Picture, Shown
from megapsft.metrics.trackers import missing


class TensorBoard:
    """Implements Tracker by event files in `directory`.

    Args:
        resumed_at: the last update that counts; what is there of later ones, by a run that was killed, is hidden. 0 hides all.

    Raises:
        Refused: tensorboard is not installed.
    """

    note = None

    def __init__(self, directory: str | Path, *, resumed_at: int = 0):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise Refused("log.tensorboard=true", f"needs tensorboard ({error})", missing("log.tensorboard=false")) from None
        # benchmarks before the first update are of update 0, and come again
        self._writer = SummaryWriter(str(directory), purge_step=resumed_at + 1 if resumed_at else 0)

    def write(self, scalars: Mapping[str, float], update: int) -> None:
        for key, value in scalars.items():
            self._writer.add_scalar(key, value, global_step=update)
        self._writer.flush()

    def show(self, shown: Sequence[Shown], update: int) -> None:
        """Pictures as images `pictures/<name>`, tables as Markdown in texts `tables/<name>`."""
        for one in shown:
            if isinstance(one, Picture):
                import numpy as np
                from PIL import Image  # it comes with matplotlib, which drew the picture

                with Image.open(one.png) as image:
                    pixels = np.asarray(image.convert("RGB"))  # [height, width, 3]
                self._writer.add_image(f"pictures/{one.name}", pixels, global_step=update, dataformats="HWC")
            else:
                self._writer.add_text(f"tables/{one.name}", one.markdown(), global_step=update)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


__all__ = ["TensorBoard"]
