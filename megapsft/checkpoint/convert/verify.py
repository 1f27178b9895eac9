"""Whether two checkpoints hold the same weights, and each of them what its manifest says: bit by bit, in bounded memory."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megapsft.checkpoint.adapters import adapter_of, base_of, merged, merges_adapters
from megapsft.checkpoint.convert.hf_to_megatron import as_written
from megapsft.checkpoint.convert.manifest import MANIFEST, describe, hash_outside, read_manifest
from megapsft.checkpoint.convert.megatron_to_hf import find
from megapsft.checkpoint.convert.to_safetensors import ADAPTER_FILE
from megapsft.checkpoint.convert.workers import Options, Progress, each, read_rows, windows
from megapsft.checkpoint.files.direct import Buffers, as_bytes
from megapsft.checkpoint.hf_folder import NOT_WEIGHTS, is_hf, read_config
from megapsft.checkpoint.state import STATE, read_state
from megapsft.checkpoint.weights import Stored, Weights
from megapsft.checkpoint.weights.beside import Beside
from megapsft.checkpoint.weights.cast import Cast
from megapsft.checkpoint.weights.fp8 import BLOCK, FP8, Quantised
from megapsft.checkpoint.weights.hf import INDEX, SINGLE, FileWeights, HFWeights, some
from megapsft.checkpoint.weights.torch_dist import DistWeights
from megapsft.errors import Refused
from megapsft.models.adapters import PREFIX
from megapsft.models.families import family_of
from megapsft.models.hf_config import HFConfig
from megapsft.models.names import HF_EMBEDDING, HF_OUTPUT

COPIES = 8  # windows that a worker holds: two sides, the pages they are read through, and both in fp32 where they differ
SHOWN = 20  # problems that are worded; the others are counted


class Side(NamedTuple):
    """A checkpoint that is compared."""

    path: Path
    folder: Path  # with the manifest, where there is one
    hf: HFConfig
    stored: FileWeights | DistWeights | Beside  # as the files have them
    weights: Weights  # as they are compared
    manifest: dict[str, Any] | None
    step: int | None  # of training, where it is known


@dataclass
class Report:
    """What a comparison found."""

    tensors: int = 0
    nbytes: int = 0
    equal: int = 0  # tensors that are the same bit by bit
    rounded: int = 0  # tensors that are the same once rounded to the narrower of two dtypes
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(hf_dir: Path, against: Path, model: Path | None = None, options: Options | None = None) -> Report:
    """Compare the Hugging Face folder `hf_dir` with another, or with a torch_dist checkpoint.

    Args:
        against: whatever `megatron_to_hf.find` finds a checkpoint at, or a Hugging Face folder.
        model: config of the checkpoint, where it does not say it itself.

    Raises:
        Refused: one of them cannot be read.
    """
    options = options or Options()
    report = Report()
    left, right = _in_one_form(open_side(hf_dir, None, options), open_side(against, model, options), report)
    report.problems += _configs(left.hf, right.hf)
    report.problems += [problem for side in (left, right) for problem in _stray_files(side)]
    _names(left, right, report)
    names = [name for name in left.weights.tensors if name in right.weights.tensors and _alike(left, right, name, report)]
    digests = _compare(left, right, names, report, options)
    report.problems += [problem for side, found in zip((left, right), digests, strict=True) for problem in _stale(side, found)]
    report.problems += _moved(left, right, report)
    return report


def open_side(path: Path, model: Path | None, options: Options) -> Side:
    """The weights at `path`, as they are stored, the adapter beside them, and what is carried along.

    Those of a run that trained adapters are merged.
    """
    path = Path(path)
    if is_hf(path):
        hf, file = read_config(path), path / ADAPTER_FILE
        base, manifest = HFWeights(path, options.direct, family_of(hf).spelling), read_manifest(path)
        stored = Beside(base, FileWeights(file, options.direct)) if file.is_file() else base
        return Side(path, path, hf, stored, stored, manifest, (manifest or {}).get("step"))
    found = find(path, model)
    hf, state = read_config(found.model), read_state(found.checkpoint) if (found.checkpoint / STATE).is_file() else {}
    folder = found.checkpoint.parent
    if merges_adapters(state):
        stored = DistWeights(found.checkpoint, hf, options.direct, adapter=True)
        base = base_of(found.checkpoint, state, found.model, hf)
        weights = merged(base, adapter_of(stored, found.model), None, hf)
        return Side(found.checkpoint, folder, hf, stored, weights, read_manifest(folder), state.get("step"))
    stored = as_written(found.checkpoint, found.model, hf, options)
    return Side(found.checkpoint, folder, hf, stored, stored, read_manifest(folder), state.get("step"))


def _in_one_form(left: Side, right: Side, report: Report) -> tuple[Side, Side]:
    """Where only one side is in FP8, the other as it would be: quantising is exact arithmetic, and can be compared bit by bit."""
    fp8 = [{name for name, stored in side.weights.tensors.items() if stored.dtype == FP8} for side in (left, right)]
    if bool(fp8[0]) == bool(fp8[1]):
        return left, right
    if not fp8[0]:
        right, left = _in_one_form(right, left, report)
        return left, right
    absent = sorted(fp8[0] - set(right.weights.tensors))
    if absent:
        rule = f"lacks {some(absent)}, which {left.path} has in FP8"
        raise Refused(str(right.path), rule, "compare models of one architecture")
    report.notes.append(f"{left.path} is in FP8: the other is quantised in the same way, and compared with it")
    weights: Weights = right.weights
    kept = left.weights.tensors[HF_EMBEDDING].dtype
    if any(stored.dtype != kept for stored in weights.tensors.values()):
        weights = Cast(weights, kept)
    return left, right._replace(weights=Quantised(weights, fp8[0], left.hf.fp8_block or BLOCK))


def _configs(left: HFConfig, right: HFConfig) -> list[str]:
    """What the two models differ in; not the dtype, which is looked at tensor by tensor."""
    names = [entry.name for entry in fields(HFConfig) if entry.compare and entry.name not in ("dtype", "fp8_block")]
    pairs = [(name, getattr(left, name), getattr(right, name)) for name in names]
    return [f"config.json: {name} is {ours}, and {theirs} in the other" for name, ours, theirs in pairs if ours != theirs]


def _names(left: Side, right: Side, report: Report) -> None:
    """Tensors that only one side has. Tied embeddings may be stored once or twice; an adapter need not be on both."""
    tied = {HF_OUTPUT} if left.hf.tie_word_embeddings and right.hf.tie_word_embeddings else set()
    for side, other in ((left, right), (right, left)):
        here = [name for name in side.weights.tensors if name not in tied and not name.endswith(NOT_WEIGHTS)]
        only = [name for name in here if name not in other.weights.tensors]
        base = [name for name in only if not name.startswith(PREFIX)]
        if base:
            report.problems.append(f"{side.path} has {len(base)} tensors that {other.path} has not: {some(base)}")
        if len(only) > len(base):
            report.notes.append(f"{side.path} keeps an adapter beside the base, {other.path} does not")


def _alike(left: Side, right: Side, name: str, report: Report) -> bool:
    ours, theirs = left.weights.tensors[name], right.weights.tensors[name]
    if ours.shape != theirs.shape:
        report.problems.append(f"{name}: {describe(ours)}, and {describe(theirs)} in the other")
    return ours.shape == theirs.shape


def _compare(
    left: Side, right: Side, names: list[str], report: Report, options: Options
) -> tuple[dict[str, str], dict[str, str]]:
    """Every tensor of both; the sha256 of each side's."""
    digests: tuple[dict[str, str], dict[str, str]] = ({}, {})
    different: dict[str, str] = {}
    rounded: set[str] = set()
    other = threading.local()

    def check(name: str, window: int, buffers: Buffers, progress: Progress) -> None:
        if not hasattr(other, "buffers"):
            other.buffers = Buffers()
        ours, theirs = left.weights.tensors[name], right.weights.tensors[name]
        found, count, first, largest = (hashlib.sha256(), hashlib.sha256()), 0, None, 0.0
        for start, stop in windows(ours if ours.row_bytes > theirs.row_bytes else theirs, window):
            a = read_rows(left.weights, name, start, stop, buffers)
            b = read_rows(right.weights, name, start, stop, other.buffers)
            found[0].update(as_bytes(a).numpy())
            found[1].update(as_bytes(b).numpy())
            progress(a.nbytes)
            if a.dtype != b.dtype:
                narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
                a, b = a.to(narrow), b.to(narrow)
            unequal = as_bytes(a).view(len(a), -1) != as_bytes(b).view(len(b), -1) if not _same(a, b) else None
            if unequal is not None:
                wrong = unequal.view(a.numel(), -1).any(dim=1)
                count += int(wrong.sum())
                at = int(wrong.int().argmax())
                first = first if first is not None else start * (a.numel() // len(a)) + at
                gap = (a.float().flatten()[wrong] - b.float().flatten()[wrong]).abs().max()
                largest = max(largest, float(gap)) if gap == gap else float("nan")
        for side, digest in zip(digests, found, strict=True):
            side[name] = digest.hexdigest()
        if count:
            where = list(_index(first, ours))
            different[name] = (
                f"{count} of {ours.nbytes // ours.dtype.itemsize} elements differ, first {where}, by {largest:.3g} at most"
            )
        elif ours.dtype != theirs.dtype:
            rounded.add(name)

    each(check, {name: left.weights.tensors[name] for name in names}, COPIES, "verify", options)
    report.tensors, report.rounded = len(names), len(rounded)
    report.equal = len(names) - len(different) - len(rounded)
    report.nbytes = sum(side.weights.tensors[name].nbytes for side in (left, right) for name in names)
    if rounded:
        one = next(iter(rounded))
        pair = " and ".join(describe(side.weights.tensors[one]).split()[0] for side in (left, right))
        report.notes.append(f"{len(rounded)} tensors are stored as {pair}, and are equal once rounded to the narrower one")
    by_digest = {digest: name for name, digest in digests[1].items()}
    for number, name in enumerate(name for name in names if name in different):
        twin = by_digest.get(digests[0][name])
        moved = f"; it is what the other has as {twin}" if twin is not None else ""
        if number < SHOWN:
            report.problems.append(f"{name}: {different[name]}{moved}")
    if len(different) > SHOWN:
        report.problems.append(f"and {len(different) - SHOWN} more tensors differ")
    return digests


def _stale(side: Side, digests: dict[str, str]) -> list[str]:
    """What is not any more what the manifest says was written: tensors, and all files around them."""
    if side.manifest is None or side.weights is not side.stored:
        return []
    said, problems = side.manifest["tensors"], []
    wrong = [name for name, digest in digests.items() if name in said and said[name]["sha256"] != digest]
    gone = [name for name in said if name not in side.weights.tensors and name != HF_OUTPUT]
    now, then = hash_outside(side.folder, side.stored.places()), side.manifest["files"]
    changed = [file for file in then if now.get(file) != then[file]]
    for what, names in (("tensors changed", wrong), ("tensors are gone", gone), ("files changed or are gone", changed)):
        if names:
            problems.append(f"{side.path}: {len(names)} {what} since {MANIFEST} was written: {some(names)}")
    return problems


def _stray_files(side: Side) -> list[str]:
    """Files of weights that do not belong to the model beside them, as an older export leaves them."""
    known = {path for path, *_ in side.stored.places()}
    folder = side.folder if is_hf(side.path) else side.path
    stray = sorted(path.name for path in folder.glob("*.safetensors") if path not in known)
    if (folder / INDEX).is_file() and folder / SINGLE in known:
        stray.append(INDEX)
    return [f"{side.path}: {some(stray)} does not belong to the model: a file of another export?"] if stray else []


def _moved(left: Side, right: Side, report: Report) -> list[str]:
    """Equal weights of different steps: the training, or the export, did nothing."""
    if left.step is None or right.step is None:
        return []
    steps = f"step {left.step} ({left.path}) and step {right.step} ({right.path})"
    if left.step == right.step:
        report.notes.append(f"both are of step {left.step}")
        return []
    if report.tensors and report.equal + report.rounded == report.tensors:
        return [f"{steps} have the same weights, although training moved: one of them was exported from the other's checkpoint"]
    report.notes.append(f"these are {steps}")
    return []


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(as_bytes(a), as_bytes(b))


def _index(position: int, stored: Stored) -> Iterator[int]:
    for axis in range(len(stored.shape)):
        below = 1
        for size in stored.shape[axis + 1 :]:
            below *= size
        yield position // below
        position %= below
