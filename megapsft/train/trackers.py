"""The trackers of a run, as its config names them."""

from __future__ import annotations

from megapsft.config import Config, flatten
from megapsft.metrics.tensorboard import TensorBoard
from megapsft.metrics.trackers import Tracker
from megapsft.metrics.weights_and_biases import WandB
from megapsft.train.plan import run_folder


def open_trackers(config: Config, update: int) -> list[Tracker]:
    """Those of `log`, each to go on after `update`; 0: from the beginning.

    Raises:
        Refused: the package of one is not installed.
    """
    folder, found = run_folder(config), list[Tracker]()
    if config.log.tensorboard:
        found.append(TensorBoard(folder / "tensorboard", resumed_at=update))
    if config.log.wandb != "disabled":
        page = {"project": config.log.wandb_project, "mode": config.log.wandb, "name": folder.name, "config": flatten(config)}
        found.append(WandB(folder, resumed_at=update, **page))
    return found


__all__ = ["open_trackers"]
