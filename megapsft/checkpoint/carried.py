"""What a model has beside its language model, such as a vision tower: its tensors from folder to folder, as the bytes they are.

Nothing of it is loaded into a model, cast or quantised. A Hugging Face folder has these tensors among the others. A folder whose
weights are elsewhere, or of Megatron, has them in a file of their own, under the names that they came with.
"""

from __future__ import annotations

from pathlib import Path

from megapsft.checkpoint.convert.target import Target
from megapsft.checkpoint.convert.to_safetensors import SafetensorsTarget
from megapsft.checkpoint.convert.workers import windows
from megapsft.checkpoint.files.direct import as_bytes
from megapsft.checkpoint.hf_folder import CARRIED, Carried, open_carried
from megapsft.checkpoint.weights import Weights, rows_of
from megapsft.models.family import Family

WINDOW = 32 * 2**20  # bytes that are copied at once


def target_of(found: Carried, folder: Path, direct: bool = False) -> SafetensorsTarget:
    """The file that is to have it in `folder`."""
    return SafetensorsTarget(folder, {}, 0, direct, {CARRIED: found.part.tensors}, found.stored.spelling)


def keep_carried(source: Path, family: Family, folder: Path) -> None:
    """Copy what the model of `source` carries along into `folder`, where its family has something of it.

    Raises:
        Refused: what `open_carried` refuses.
    """
    found = open_carried(source, family)
    if found is None:
        return
    target = target_of(found, folder)
    target.open()
    copy_tensors(found.part, target)
    target.close()


def copy_tensors(weights: Weights, target: Target) -> None:
    """Every tensor of the weights to its place in the target, a window of rows at a time."""
    for name, stored in weights.tensors.items():
        for start, stop in windows(stored, WINDOW):
            target.write(name, start, as_bytes(rows_of(weights, name, start, stop)))
