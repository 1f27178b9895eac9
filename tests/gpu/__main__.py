"""Checks and measurements on a GPU, with what this interpreter has installed: nothing is fetched.

    python -m tests.gpu test [--results FOLDER] [arguments of pytest]                # test_gpu.json in docs/results, and gpu.md
    python -m tests.gpu bench [--results FOLDER] [arguments of benchmarks/gpu.py]    # gpu.json there, and gpu.md
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import megapsft  # noqa: F401  before megatron

ROOT = Path(__file__).resolve().parents[2]
CHECKS = "tests/gpu"
PACKAGES = {"megatron.core": "megatron-core", "pydantic": "pydantic", "tyro": "tyro", "transformers": "transformers",
            "pytest_timeout": "pytest-timeout"}  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("what", choices=("test", "bench"))
    parser.add_argument("--results", type=Path, default=ROOT / "docs/results", help="folder (docs/results)")
    options, more = parser.parse_known_args(arguments)
    what = options.what
    lacking = missing()
    for one in lacking:
        print(f"make {what}-gpu: needs {one}", file=sys.stderr)
    if lacking:
        print(f"{sys.executable} runs this; name another as PYTHON. Wheels for a machine without network: make gpu-wheels",
              file=sys.stderr)  # fmt: skip
        return 2
    benchmark = [sys.executable, "benchmarks/gpu.py", "--json", str(options.results.resolve() / "gpu.json")]
    if what == "bench":
        return subprocess.run([*benchmark, *more], cwd=ROOT).returncode
    checks = [] if any(one.startswith(CHECKS) for one in more) else [CHECKS]  # all, where none is named
    record = ["-p", "tests.gpu.record", "--record", str(options.results.resolve() / "test_gpu.json")]
    done = subprocess.run([sys.executable, "-m", "pytest", *checks, *record, *more], cwd=ROOT).returncode
    subprocess.run([*benchmark, "--report"], cwd=ROOT, check=True)
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
