"""A run: what decides it, the folder that this names, and how it is carried out."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from evidence.measured import Measured, measure
from evidence.tasks import Amounts, make_files
from megapsft.config import flatten, load_config

HERE = Path(__file__).resolve().parent
CONFIGS = HERE / "configs"
ARCHITECTURE = ("--family=qwen3", "--vocab-size=384", "--hidden-size=96", "--num-layers=2", "--head-dim=24")
RESULT, MODEL, RANDOM = "result.json", "hf", "random"


@dataclass(frozen=True)
class Spec:
    """A run by all that decides it but for the code of megapsft: equal ones are one run, whoever asks for it."""

    config: str  # file in evidence/configs
    rows: str  # one of tasks.FILES
    set: tuple[str, ...]  # key=value, over the file
    start: Spec | None  # whose model it starts from; None: a random one
    amounts: Amounts  # of data

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits of the config with all its defaults, the data, and what it starts from."""
        return _digest(self)

    def folder(self, work: Path) -> Path:
        return work / "runs" / self.digest


@cache  # plans make the same specs again and again
def _digest(spec: Spec) -> str:
    config = flatten(load_config(CONFIGS / spec.config, spec.set))
    return digest_of([config, spec.rows, data_digest(spec.amounts), spec.start.digest if spec.start else ARCHITECTURE])


def digest_of(value: Any) -> str:
    """Of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@cache  # and a source that is edited while runs are made is that of the next command
def data_digest(amounts: Amounts) -> str:
    """Of the files that `make_files` makes: their amounts, and the text of what makes them, and of what says who is right."""
    return digest_of([vars(amounts), *((HERE / name).read_text() for name in ("tasks.py", "right.py"))])


def stored(spec: Spec, work: Path) -> Measured | None:
    """What came of the run, where it is done."""
    path = spec.folder(work) / RESULT
    return Measured(**json.loads(path.read_text())) if path.is_file() else None


def carry_out(spec: Spec, work: Path) -> None:
    """Train, export and measure, in this process. What an earlier try left is removed; the result appears last.

    Raises:
        RuntimeError: a command of megapsft failed; it has said why.
    """
    folder, data = spec.folder(work), work / "data" / data_digest(spec.amounts)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = spec.start.folder(work) / MODEL if spec.start else folder / RANDOM
    if spec.start is None:
        seed = load_config(CONFIGS / spec.config, spec.set).train.seed
        _megapsft("init-model", *ARCHITECTURE, f"--seed={seed}", "--data", data / "pretrain.jsonl", "--out", start)
    problems = ",".join(str(data / f"{name}.jsonl") for name in ("valid", "in", "out"))
    where = {"model.path": start, "data.path": data / f"{spec.rows}.jsonl", "run.dir": folder, "evaluate.data": f"[{problems}]"}
    _megapsft("train", CONFIGS / spec.config, *(f"{key}={value}" for key, value in where.items()), *spec.set)
    _megapsft("export", folder, "--out", folder / MODEL)
    beside = folder / f"{RESULT}.tmp"
    beside.write_text(json.dumps(vars(measure(folder))) + "\n")
    shutil.rmtree(folder / "checkpoints")
    os.replace(beside, folder / RESULT)


def make_data(amounts: Amounts, work: Path) -> None:
    """The files that runs read, where they are not there."""
    folder = work / "data" / data_digest(amounts)
    if not folder.exists():
        beside = folder.with_suffix(".tmp")
        shutil.rmtree(beside, ignore_errors=True)
        make_files(beside, amounts)
        os.replace(beside, folder)


def _megapsft(*arguments: Any) -> None:
    from megapsft.cli import main

    given = [str(argument) for argument in arguments]
    print("$ megapsft " + " ".join(given), flush=True)
    if code := main(given):
        raise RuntimeError(f"megapsft {given[0]} ended with exit code {code}")
