"""One conversion from beginning to end: checks, room on the disk, copying, the manifest, and the name at last."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal

from megapsft import __version__
from megapsft.checkpoint.convert.copy import check_memory, copy, read_back
from megapsft.checkpoint.convert.journal import NAME, Done, Journal, matches
from megapsft.checkpoint.convert.manifest import MANIFEST, MAPPING, describe, write_manifest
from megapsft.checkpoint.convert.target import Target
from megapsft.checkpoint.convert.workers import Options
from megapsft.checkpoint.files.direct import refuse_full
from megapsft.checkpoint.unfinished import Unfinished, check_free
from megapsft.checkpoint.weights import Weights
from megapsft.checkpoint.weights.beside import Beside
from megapsft.checkpoint.weights.hashed import Hashed
from megapsft.checkpoint.weights.hf import FileWeights
from megapsft.checkpoint.weights.torch_dist import DistWeights
from megapsft.errors import Refused

SLACK = 64 * 2**20  # bytes for config, tokenizer, manifest and the file system's own


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What to convert, once all of it is checked."""

    weights: Weights  # as they are to be stored
    sources: Hashed  # as they are read
    source_files: list[Path]
    target: Callable[[Path], Target]  # for the partial folder
    reopen: Callable[[Path], FileWeights | DistWeights | Beside]  # what was written to the partial folder
    finish: Callable[[Path], None]  # writes config, tokenizer and what else the partial folder needs
    about: Mapping[str, Any]  # for the manifest: direction, architecture, dtype, ...
    checks: list[str]  # that were made before anything was written
    warnings: list[str] = field(default_factory=list)  # of what the result will lack
    options: Options = field(default_factory=Options)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a conversion did."""

    out: Path
    tensors: int
    nbytes: int
    resumed: int  # tensors that an earlier attempt had written
    nonfinite: dict[str, int]  # tensors with numbers that are infinite or not a number, and how many
    warnings: list[str]  # for whoever goes on with it


def convert(plan: Conversion, out: Path) -> Result:
    """Write `out`, from where an earlier attempt with the same plan ended; nothing where `options.dry_run`.

    Raises:
        Refused: `out` is taken or cannot be written, the disk is too small, the memory too, a source ends too early.
    """
    if plan.options.dry_run:
        return _preview(plan, out)
    unfinished = Unfinished(out)
    fingerprint = _fingerprint(plan)
    resumes = matches(unfinished.folder, fingerprint)
    try:
        target = plan.target(unfinished.folder)
        resumes = resumes and target.is_there()
        if not resumes:
            unfinished.empty()
        _check_room(target, unfinished.folder)
        _check_same(plan.weights, target)
        check_memory(plan.weights, plan.sources, target, plan.options)
        target.open()
    except BaseException:
        unfinished.leave() if resumes else unfinished.discard()
        raise
    try:
        with refuse_full(unfinished.folder):
            done, resumed = _write(plan, target, unfinished, fingerprint)
    except BaseException:
        unfinished.leave()
        raise
    nonfinite = {name: done[name].nonfinite for name in target.tensors if done[name].nonfinite}
    return Result(
        out=out,
        tensors=len(done),
        nbytes=target.nbytes,
        resumed=resumed,
        nonfinite=nonfinite,
        warnings=plan.warnings,
    )


def _preview(plan: Conversion, out: Path) -> Result:
    """All checks of a conversion, and what it would write."""
    check_free(out)
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    target = plan.target(out)
    if target.nbytes > (free := shutil.disk_usage(there).free):
        raise _no_room(there, target.nbytes, free)
    _check_same(plan.weights, target)
    check_memory(plan.weights, plan.sources, target, plan.options)
    tensors = len(target.tensors)
    return Result(out=out, tensors=tensors, nbytes=target.nbytes, resumed=0, nonfinite={}, warnings=plan.warnings)


def _write(plan: Conversion, target: Target, unfinished: Unfinished, fingerprint: str) -> tuple[dict[str, Done], int]:
    """All that `out` holds, and its name at last; what is written, and how many tensors an earlier attempt had."""
    journal = Journal(unfinished.folder, fingerprint, target.sync, plan.options.sync_every)
    resumed = len(journal.done)
    copy(plan.weights, plan.sources, target, journal, plan.about["direction"], plan.options)
    journal.close()
    target.close()
    written = plan.reopen(unfinished.folder)  # which refuses what is not whole
    if plan.options.read_back:
        try:
            read_back(written, journal.done, plan.options)
        except Refused:
            unfinished.discard()
            raise
    plan.finish(unfinished.folder)
    write_manifest(
        unfinished.folder / MANIFEST,
        plan.about,
        plan.sources,
        target.tensors,
        journal.done,
        plan.source_files,
        plan.checks,
        written.places(),
    )
    (unfinished.folder / NAME).unlink()
    unfinished.finish()
    return journal.done, resumed


def _check_same(weights: Weights, target: Target) -> None:
    """That what is to be written is what there is to be read, tensor by tensor."""
    for name, stored in target.tensors.items():
        found = weights.tensors.get(name)
        if found != stored:
            raise Refused(name, f"is {describe(found)}, and is to be written as {describe(stored)}", "give --dtype")


def _check_room(target: Target, folder: Path) -> None:
    """That the disk has room for what is not there yet."""
    there = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
    needed, free = target.nbytes - there + SLACK * (target.nbytes > SLACK), shutil.disk_usage(folder).free
    if needed > free:
        raise _no_room(folder.parent, needed, free)


def _no_room(folder: Path, needed: int, free: int) -> Refused:
    rule = f"has {decimal(free)} free; {decimal(needed)} more are needed"
    return Refused(f"the disk of {folder}", rule, "free some space, or write to another disk")


def _fingerprint(plan: Conversion) -> str:
    """Of all that decides which bytes are written."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in plan.source_files]
    tensors = {name: [list(stored.shape), str(stored.dtype)] for name, stored in plan.weights.tensors.items()}
    content = [__version__, MAPPING, torch.__version__, dict(plan.about), files, tensors]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
