"""The memory that a conversion takes is what it was given, whatever the model; and what plans of it promise.

Not here: how fast it is (benchmarks/convert.py).
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from megapsft.checkpoint.convert import memory
from megapsft.checkpoint.convert.hf_to_megatron import hf_to_megatron
from megapsft.checkpoint.convert.megatron_to_hf import megatron_to_hf
from megapsft.checkpoint.convert.memory import LARGEST, RESERVE, SMALLEST, parse_size, plan, rows_per_window
from megapsft.checkpoint.convert.workers import Options, windows
from megapsft.checkpoint.files import direct
from megapsft.checkpoint.files.direct import PAGE
from megapsft.checkpoint.weights import Stored
from megapsft.errors import Refused
from tests.checkpoint.convert.folders import assert_same_tensors, hashes, make_dense, make_model, tensors_in

LEAST = """
import contextlib, io, sys
from megapsft.cli import main

said = io.StringIO()
with contextlib.redirect_stderr(said):
    assert main(["convert", *sys.argv[1:], "--max-memory", "1MiB"]) == 2
least = said.getvalue().split("use --max-memory ")[1].split()[0]
assert main(["convert", *sys.argv[1:], "--max-memory", least]) == 0
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(least.removesuffix("MiB"), int(peak) / 2**10)
"""


def least_and_peak(*arguments: object) -> tuple[float, float]:
    """MiB that `megapsft convert ...` says it needs at least, and that it takes when it is given just that."""
    done = subprocess.run(
        [sys.executable, "-c", LEAST, *(str(argument) for argument in arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[3])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    least, peak = done.stdout.splitlines()[-1].split()
    return float(least), float(peak)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """Two tensors of 82 MB, where plans leave a tenth of that for windows, and few others."""
    return make_dense(tmp_path_factory.mktemp("memory") / "hf", 10, vocab=40_000)


def test_no_more_memory_is_taken_than_was_given(large, tmp_path):
    least, peak = least_and_peak("hf-to-megatron", "--hf", large, "--out", tmp_path / "converted", "--verify")
    assert peak < least
    rounding = ("--dtype", "bf16", "--max-shard-size", "100MB")
    least, peak = least_and_peak("megatron-to-hf", "--megatron", tmp_path / "converted", "--out", tmp_path / "back", *rounding)
    assert peak < least
    expected, found = tensors_in(large), tensors_in(tmp_path / "back")
    assert expected.keys() == found.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name].bfloat16()), name


SMALL_WINDOWS = [  # bytes; rows of the models have 256 to 512, so that windows end within pages, chunks and heads
    (300, 300),
    (1000, 5000),
    (4096, 4096),
    (10_000, 70_000),
]


@pytest.mark.parametrize("name", ["qwen3-tied", "qwen2", "qwen3-moe"])
@pytest.mark.parametrize("sizes", SMALL_WINDOWS, ids=str)
def test_the_same_bytes_whatever_the_windows(name, sizes, tmp_path, monkeypatch):
    source = make_model(name, tmp_path / "hf")
    hf_to_megatron(source, tmp_path / "converted")
    monkeypatch.setattr(memory, "SMALLEST", sizes[0])
    monkeypatch.setattr(memory, "LARGEST", sizes[1])
    hf_to_megatron(source, tmp_path / "small", options=Options(workers=3))
    assert hashes(tmp_path / "small") == hashes(tmp_path / "converted")
    megatron_to_hf(tmp_path / "small", tmp_path / "back", options=Options(workers=3, read_back=True))
    assert_same_tensors(tmp_path / "back", source)


@pytest.mark.parametrize("how", ["not asked for", "refused when opened", "on tmpfs"])
def test_the_same_bytes_without_direct_io(how, tmp_path, monkeypatch):
    source = make_model("qwen3", tmp_path / "hf", shards=True)
    whole = hf_to_megatron(source, tmp_path / "converted")
    options = Options(direct=how != "not asked for")
    out = tmp_path
    if how == "refused when opened":
        monkeypatch.setattr(direct, "_open_direct", lambda path, flags: None)
    if how == "on tmpfs" and Path("/dev/shm").is_dir():
        out = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        assert hf_to_megatron(source, out / "other", options=options).tensors == whole.tensors
        assert hashes(out / "other") == hashes(tmp_path / "converted")
        megatron_to_hf(out / "other", out / "back", options=options)
        assert_same_tensors(out / "back", source)
    finally:
        if out != tmp_path:
            shutil.rmtree(out)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1), ("1000000", 10**6), ("600MiB", 600 * 2**20), ("600mib", 600 * 2**20), ("5GB", 5 * 10**9), ("5G", 5 * 10**9),
        ("5Gi", 5 * 2**30), ("1.5 GiB", 3 * 2**29), (" 2 K ", 2000), ("1TiB", 2**40), ("7B", 7), ("0.5KiB", 512),
    ],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "0", "0GB", "-1GB", "1e9", "5I", "5IB", "5 PB", "5GBB", "5..0GB", "٥GB", "0.1", "nan", "9" * 400]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(Refused, match="is not a number of bytes; write for example 600MiB or 5GB"):
        parse_size(text)


@pytest.mark.parametrize("seed", range(50))
def test_a_plan_fits_into_what_is_free(seed, monkeypatch):
    pick = random.Random(seed)
    resident, free = pick.randrange(2**28), pick.randrange(2**24, 2**32)
    workers, copies, row = pick.randrange(1, 65), pick.randrange(1, 12), 2 ** pick.randrange(1, 23) * pick.choice([1, 3, 5])
    monkeypatch.setattr(memory, "resident", lambda: resident)
    given = resident + RESERVE + free
    least = max(SMALLEST, row)
    if free // copies < least:
        with pytest.raises(Refused, match="use --max-memory ([0-9]+)MiB or more") as refusal:
            plan(given, workers, copies, row)
        enough = parse_size(refusal.value.remedy.split()[2])
        assert plan(enough, workers, copies, row).workers >= 1
        return
    budget = plan(given, workers, copies, row)
    assert 1 <= budget.workers <= workers
    assert least <= budget.window <= max(LARGEST, least)
    assert budget.workers * copies * budget.window <= free
    more = budget.workers + 1
    assert budget.workers == workers or free // (more * copies) < least  # no worker is sent away without need


@pytest.mark.parametrize("seed", range(50))
def test_windows_are_all_rows_once_of_whole_pages_where_that_can_be(seed):
    pick = random.Random(seed)
    stored = Stored((pick.randrange(1, 5000), pick.randrange(1, 300)), pick.choice([torch.bfloat16, torch.float32]))
    window = pick.randrange(1, 2**20)
    found = list(windows(stored, window))
    assert found[0][0] == 0
    assert found[-1][1] == stored.rows
    assert all(before[1] == after[0] for before, after in zip(found, found[1:], strict=False))
    for start, stop in found:
        assert stop - start == 1 or (stop - start) * stored.row_bytes <= window
    page = next(rows for rows in range(1, PAGE + 1) if rows * stored.row_bytes % PAGE == 0)
    if page * stored.row_bytes <= window:
        assert all(start * stored.row_bytes % PAGE == 0 for start, _ in found)
    assert rows_per_window(window, stored.row_bytes) >= 1
