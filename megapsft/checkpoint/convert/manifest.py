"""`conversion.json`: what was converted from what, with the hash of every tensor, so that it can be checked at any time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megapsft import __version__
from megapsft.checkpoint.convert.journal import NAME, Done
from megapsft.checkpoint.files.safetensors import NAMES
from megapsft.checkpoint.hf_save import MANIFEST
from megapsft.checkpoint.unfinished import LOCK
from megapsft.checkpoint.weights import Stored
from megapsft.checkpoint.weights.hashed import Hashed
from megapsft.checkpoint.weights.hf import read_json
from megapsft.errors import Refused

NOT_HASHED = (MANIFEST, NAME, LOCK)
MAPPING = 1  # of the table of parameters; another one where the same weights would be stored otherwise


def write_manifest(
    path: Path,
    about: Mapping[str, Any],
    sources: Hashed,
    tensors: Mapping[str, Stored],
    done: Mapping[str, Done],
    files: Sequence[Path],
    checks: Sequence[str],
    places: Iterable[tuple[Path, int, int]],
) -> None:
    """Nothing in it depends on when, where or how fast it was: the same conversion writes the same bytes."""
    source = {}
    for name in tensors:
        for read, digest in done[name].sources.items():
            source[read] = _entry(sources.tensors[read], digest)
    content = {
        "megapsft": __version__,
        "mapping": MAPPING,
        **about,
        "source": {
            "files": {file.name: file.stat().st_size for file in files},
            "tensors": dict(sorted(source.items())),
        },
        "files": hash_outside(path.parent, places),
        "tensors": {name: _entry(stored, done[name].sha256, done[name].nonfinite) for name, stored in tensors.items()},
        "checks": list(checks),
    }
    path.write_text(_lines(content) + "\n")


def hash_outside(folder: Path, places: Iterable[tuple[Path, int, int]]) -> dict[str, str]:
    """The sha256 of every file of the folder, without the tensors' data: those are hashed one by one.

    Args:
        places: (file, first byte, bytes) of all data.
    """
    data: dict[Path, list[tuple[int, int]]] = {}
    for path, start, nbytes in places:
        data.setdefault(path, []).append((start, nbytes))
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in NOT_HASHED):
        digest, at = hashlib.sha256(), 0
        with path.open("rb") as file:
            for start, nbytes in [*sorted(data.get(path, [])), (path.stat().st_size, 0)]:
                file.seek(at)
                digest.update(file.read(start - at))
                at = start + nbytes
        found[str(path.relative_to(folder))] = digest.hexdigest()
    return found


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a converted folder; None where there is none.

    Raises:
        Refused: it is not one.
    """
    if not (folder / MANIFEST).is_file():
        return None
    content = read_json(folder / MANIFEST)
    if not isinstance(content.get("tensors"), dict) or not isinstance(content.get("source"), dict):
        raise Refused(str(folder / MANIFEST), "is not a manifest of a conversion", "delete it, or convert again")
    return content


def describe(stored: Stored | None) -> str:
    return "not there" if stored is None else f"{NAMES[stored.dtype]} {list(stored.shape)}"


def _lines(content: Mapping[str, Any], indent: str = "") -> str:
    """JSON with a line for each tensor, so that it can be read and compared by eye."""
    lines = []
    for key, value in content.items():
        nested = isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values())
        text = _lines(value, indent + " ") if nested else json.dumps(value)
        lines.append(f"{indent} {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def _entry(stored: Stored, sha256: str, nonfinite: int = 0) -> dict[str, Any]:
    entry = {"dtype": NAMES[stored.dtype], "shape": list(stored.shape), "sha256": sha256}
    return entry | ({"nonfinite": nonfinite} if nonfinite else {})
