"""requirements/laptop.txt leaves nothing that `make venv` installs to the day it is run on."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
NOT_OF_A_LAPTOP = ("nvidia-", "cuda-")  # what torch's build for CUDA asks for


def pinned(file: str) -> set[str]:
    lines = (ROOT / "requirements" / file).read_text().splitlines()
    return {canonicalize_name(line.partition("==")[0]) for line in lines if "==" in line and not line.startswith("#")}


def needed(name: str, extras: frozenset[str]) -> set[str]:
    """What a package asks for here, and what that asks for, and so on."""
    found, waiting, seen = set(), [(name, extras)], set()
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        for line in importlib.metadata.requires(one[0]) or []:
            wanted = Requirement(line)
            if wanted.marker and not any(wanted.marker.evaluate({"extra": extra}) for extra in (*one[1], "")):
                continue
            package = canonicalize_name(wanted.name)
            if not package.startswith(NOT_OF_A_LAPTOP):
                found.add(package)
                waiting.append((package, frozenset(wanted.extras)))
    return found


def test_all_that_the_packages_need_is_pinned_and_installed():
    found = needed("megapsft", frozenset({"laptop"}))
    assert {"torch", "megatron-core", "datasets"} <= found
    assert found - pinned("laptop.txt") - {"setuptools"} == set()
