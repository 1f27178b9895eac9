"""The same versions on every node: what is installed, and which of several is right."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import runpy
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import megapsft
from megapsft.cluster.preflight.finding import Finding

NAMES = ("megatron-core", "transformer-engine", "transformers", "tokenizers", "safetensors", "numpy")
FILE = "packages.json"  # in RUN/slurm, of the machine that submitted
SECONDS = 60
ABSENT = "none"
CHECK = "packages"


def installed() -> dict[str, str]:
    """Versions that matter in this process's environment, and in that of SGLang's servers where one is named."""
    found = {"python": platform.python_version(), "megapsft": f"{megapsft.__version__} {source_digest()}"}
    found |= {"torch": _version_of_torch()} | {name: _version(name) for name in NAMES}
    servers = os.environ.get("MEGAPSFT_SGLANG_PYTHON")
    return found | ({"sglang": _version_elsewhere(servers, "sglang")} if servers else {})


def source_digest() -> str:
    """The first digits of a SHA-256 of all of our sources, by path and content."""
    root = Path(megapsft.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def record(folder: Path) -> None:
    """Leave what is installed here in `folder`, to decide between nodes where they cannot do so themselves."""
    (folder / FILE).write_text(json.dumps(installed(), indent=1) + "\n")


def compare(by_node: Mapping[str, Mapping[str, str]], submitted: Mapping[str, str]) -> list[Finding]:
    """A finding for each node and package of which it has another version than it should.

    Right is what more than half of the nodes have; else what the submitting machine has, if any node does; else the first node's.

    Args:
        by_node: node -> package -> version, the first node of the job first.
        submitted: package -> version where the job was submitted; empty where nobody wrote it down.
    """
    found, first = [], next(iter(by_node), "")
    for package in dict.fromkeys(package for versions in by_node.values() for package in versions):
        versions = {node: versions.get(package, ABSENT) for node, versions in by_node.items()}
        right, why = _right(list(versions.values()), submitted.get(package))
        for node, version in versions.items():
            if version != right:
                remedy = f"install {right} there, or use one environment on a shared file system"
                rule = f"must be {right}, {why or f'as on {first}'}"
                found.append(Finding(node=node, check=CHECK, good=False, value=f"{package} {version}", rule=rule, remedy=remedy))
    return found


def _right(versions: Sequence[str], submitted: str | None) -> tuple[str, str]:
    """The version that all should have, and whose it is; '': the first's."""
    most, count = Counter(versions).most_common(1)[0]
    if count > len(versions) / 2:
        return most, f"as on {count} of {len(versions)} nodes"
    if submitted in versions:
        return submitted, "as where the job was submitted"
    return versions[0], ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ABSENT


def _version_of_torch() -> str:
    """With the CUDA that it was built for, which the package's own version need not have; torch is not imported for it."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return ABSENT
    return runpy.run_path(str(Path(found.origin).parent / "version.py"))["__version__"]


def _version_elsewhere(python: str, name: str) -> str:
    """Of another interpreter; what went wrong where it cannot be asked, which other nodes will not have."""
    code = f"import importlib.metadata as m; print(m.version({name!r}))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({type(error).__name__})"
    return done.stdout.strip() if done.returncode == 0 else ABSENT
