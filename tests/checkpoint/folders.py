"""Hugging Face folders whose weights are one file: edited, and checked as before training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from megapsft.checkpoint.hf_folder import SINGLE, check_checkpoint, read_config
from megapsft.models.families import family_of


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Write the weights again after `edit` had its way with them."""
    weights = load_file(folder / SINGLE)
    edit(weights)
    save_file(weights, folder / SINGLE)


def check(folder: Path) -> None:
    """
    Raises:
        Refused: as `check_checkpoint`.
    """
    hf = read_config(folder)
    check_checkpoint(folder, family_of(hf), hf)
