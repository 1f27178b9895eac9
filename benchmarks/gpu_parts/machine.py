"""What was measured on: the GPU, its driver, and every version that matters."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from typing import Any

import torch

import megapsft
from megapsft.cluster.preflight.packages import source_digest
from megapsft.platform.chips import bf16_peak

PACKAGES = ("megatron-core", "transformer-engine", "transformers", "triton", "numpy")


def machine(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "gpu": None,
        "capability": None,
        "memory_bytes": None,
        "driver": None,
        "peak_bf16_flops": None,  # of the vendor's datasheet, dense
        "cpus": os.cpu_count(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "megapsft": f"{megapsft.__version__} {source_digest()}",
        **{name: _version(name) for name in PACKAGES},
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "capability": [properties.major, properties.minor],
            "memory_bytes": properties.total_memory,
            "driver": _driver(),
            "peak_bf16_flops": bf16_peak(properties.name),
        }
    return found


def alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether numbers of both stand beside each other: machines of one pool differ by a digit of their drivers."""
    return one | {"driver": None} == other | {"driver": None}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split("\n")[0].strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None
