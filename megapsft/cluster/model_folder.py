"""Where the shape of a run's model is read: config.json is all that a plan needs, and it may lie where the weights are not."""

from __future__ import annotations

from pathlib import Path

from megapsft.checkpoint.hf import read_config
from megapsft.errors import Refused
from megapsft.models.hf_config import HFConfig

SHIPPED = "models"  # beside the folders of configs: configs/models/<name>/config.json


def shape_of_model(config_file: Path, model_path: str, folder: Path | None = None) -> HFConfig:
    """The config.json of `folder`; without one that of `model_path`, or of the model of its name that is shipped beside configs.

    Args:
        config_file: YAML of the run, in whose parents' folder `models` shapes are looked for.

    Raises:
        Refused: there is none, or it describes what is not supported.
    """
    if folder is not None:
        return read_config(folder)
    if not model_path:
        raise Refused("model.path=''", "names no model", "give a folder with config.json, or --model FOLDER")
    shipped = [parent / SHIPPED / Path(model_path).name for parent in config_file.resolve().parents]
    for place in (Path(model_path), *shipped):
        if (place / "config.json").is_file():
            return read_config(place)
    known = sorted(path.parent.name for parent in shipped for path in parent.parent.glob("*/config.json"))
    remedy = "give --model FOLDER, one with a config.json" + (f"; shapes that are known: {', '.join(known)}" if known else "")
    raise Refused(f"model.path={model_path}", "is not here, and its shape is not known", remedy)
