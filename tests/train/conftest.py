"""Models whose noise can be seen."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="session")
def scaled(tiny_models, tmp_path_factory) -> Path:
    """The tiny mixture of experts with weights six times larger: a flat random one hardly cares where its tokens go."""
    folder = tmp_path_factory.mktemp("scaled") / "qwen3_moe"
    shutil.copytree(tiny_models("qwen3_moe"), folder)
    weights = load_file(folder / "model.safetensors")
    larger = {name: tensor * 6 if tensor.dim() > 1 else tensor for name, tensor in weights.items()}
    save_file(larger, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
