"""Checks and measurements on a GPU, with what this interpreter has installed: nothing is fetched.

    python -m tests.gpu test [arguments of pytest]                # docs/results/test_gpu.json
    python -m tests.gpu bench [arguments of benchmarks/gpu.py]    # docs/results/gpu.json and gpu.md
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import megapsft  # noqa: F401  before megatron

ROOT = Path(__file__).resolve().parents[2]
BENCHMARK = ["benchmarks/gpu.py"]
CHECKS = ["-m", "pytest", "tests/gpu", "-p", "tests.gpu.record", "--record", "docs/results/test_gpu.json"]
PACKAGES = {"megatron.core": "megatron-core", "pydantic": "pydantic", "tyro": "tyro", "transformers": "transformers",
            "pytest_timeout": "pytest-timeout"}  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    what, *more = arguments or [""]
    if what not in ("test", "bench"):
        print(__doc__, file=sys.stderr)
        return 2
    lacking = missing()
    for one in lacking:
        print(f"make {what}-gpu: needs {one}", file=sys.stderr)
    if lacking:
        print(f"{sys.executable} runs this; name another as PYTHON. Wheels for a machine without network: make gpu-wheels",
              file=sys.stderr)  # fmt: skip
        return 2
    done = subprocess.run([sys.executable, *(BENCHMARK if what == "bench" else CHECKS), *more], cwd=ROOT).returncode
    if what == "test":
        subprocess.run([sys.executable, *BENCHMARK, "--report"], cwd=ROOT, check=True)
    return done


def missing() -> list[str]:
    """What is not there, each with why; empty where all of it is."""
    try:
        import torch
    except ImportError:
        return ["torch, built for CUDA"]
    found = []
    if torch.version.cuda is None:
        found.append(f"torch built for CUDA, and torch {torch.__version__} is not")
    elif not torch.cuda.is_available():
        found.append("a GPU, and torch sees none")
    look = _cannot_find if found else _cannot_import
    packages = PACKAGES | {"transformer_engine.pytorch": "transformer-engine"}
    return found + [f"{name}: {error}" for module, name in packages.items() if (error := look(module))]


def _cannot_find(module: str) -> str | None:
    """Without importing it, which takes long and may fail where there is no GPU."""
    return None if importlib.util.find_spec(module.partition(".")[0]) else "is not installed"


def _cannot_import(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # libraries that do not fit fail in many ways
        return f"{type(error).__name__}: {error}"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
