"""A converter that is killed, at any moment, and run again gives what an undisturbed one gives, bit by bit.

Real processes, real signals, real files. Not here: power cuts (what a line of the journal may say is in test_convert_journal).
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megapsft.checkpoint import unfinished
from megapsft.checkpoint.convert import copy
from megapsft.checkpoint.convert.hf_to_megatron import hf_to_megatron
from megapsft.checkpoint.convert.journal import NAME, Journal
from megapsft.checkpoint.convert.megatron_to_hf import megatron_to_hf
from megapsft.checkpoint.convert.run import Result
from megapsft.checkpoint.convert.workers import Options
from megapsft.checkpoint.unfinished import Unfinished
from megapsft.errors import Refused
from tests.checkpoint.convert.folders import assert_same_tensors, hashes, make_dense, make_model, partial_of

SLOWLY = Options(workers=1, sync_every=0.05, progress=False)
KILLS = 10
WRITTEN_LAST = {"to_megatron": ("release/.metadata", "config.json"), "to_hf": ("config.json", "model.safetensors.index.json")}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_dense(tmp_path_factory.mktemp("kill") / "hf", 26, layers=6)


@pytest.fixture(scope="module")
def converted(source) -> Path:
    hf_to_megatron(source, source.parent / "converted", options=SLOWLY)
    return source.parent / "converted"


@pytest.mark.parametrize("direction", WRITTEN_LAST)
def test_killed_at_ten_moments_and_run_again(direction, source, converted, tmp_path):
    def convert(out: Path) -> Result:
        if direction == "to_megatron":
            return hf_to_megatron(source, out, options=SLOWLY)
        return megatron_to_hf(converted, out, max_shard_bytes=8_000_000, options=SLOWLY)

    began = time.monotonic()
    assert in_child(lambda: convert(tmp_path / "whole")) == 0
    seconds = time.monotonic() - began
    expected = hashes(tmp_path / "whole")
    moments, resumed = random.Random(7), []
    for number in range(KILLS):
        out = tmp_path / "out"
        for _ in range(1 + number % 2):  # what goes on may be killed, too
            in_child(lambda out=out: convert(out), kill_after=seconds * moments.uniform(0.05, 1))
            assert_not_loadable(out, WRITTEN_LAST[direction], expected)
        if not out.exists():
            resumed.append(convert(out).resumed)
        assert hashes(out) == expected
        assert not partial_of(out).exists()
        shutil.rmtree(out)
    assert any(count > 0 for count in resumed)  # else no kill came while there was something to go on from


def assert_not_loadable(out: Path, last: tuple[str, ...], expected: dict[str, str]) -> None:
    """After a kill: the folder is whole, or is not there; and beside it, what makes it a model comes after all weights."""
    partial = partial_of(out)
    if out.exists():
        assert hashes(out) == expected
        assert not partial.exists()
        return
    there = hashes(partial) if partial.exists() else {}
    weights = [name for name in expected if name.endswith((".distcp", ".safetensors"))]
    if any(name in there for name in (*last, "conversion.json")):
        assert all(there[name] == expected[name] for name in weights)


def in_child(work: Callable[[], object], kill_after: float | None = None) -> int:
    """Run in a process of its own; killed after so many seconds, if it has not ended. Its status as `waitpid` gives it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def kill_after_tensors(work: Callable[[], object], count: int, how: signal.Signals = signal.SIGKILL) -> int:
    """Run in a process of its own, which is killed (or stopped) when so many tensors are safe; its id, if stopped."""

    class Doomed(Journal):
        def add(self, tensor, done):
            super().add(tensor, done)
            if len(self.done) == count:
                self.flush()
                os.kill(os.getpid(), how)
                time.sleep(60)

    pid = os.fork()
    if pid == 0:
        from megapsft.checkpoint.convert import run

        run.Journal = Doomed
        try:
            work()
        finally:
            os._exit(1)
    status = os.waitpid(pid, os.WUNTRACED)[1]
    assert os.WIFSTOPPED(status) if how == signal.SIGSTOP else status == signal.SIGKILL
    return pid


ONE = Options(workers=1, progress=False)


def test_goes_on_from_what_is_safe(tmp_path):
    source = make_model("qwen3", tmp_path / "hf")
    whole = hf_to_megatron(source, tmp_path / "whole", options=ONE)
    kill_after_tensors(lambda: hf_to_megatron(source, tmp_path / "out", options=ONE), 9)
    read = []
    kept = copy.inspect
    try:
        copy.inspect = lambda content, dtype, digest: read.append(1) or kept(content, dtype, digest)
        result = hf_to_megatron(source, tmp_path / "out", options=ONE)
    finally:
        copy.inspect = kept
    assert (result.resumed, len(read)) == (9, whole.tensors - 9)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("change", ["source", "dtype", "a file is gone", "a file is short"])
def test_what_was_begun_otherwise_is_not_gone_on_with(change, tmp_path):
    source = make_model("qwen3", tmp_path / "hf")
    kill_after_tensors(lambda: hf_to_megatron(source, tmp_path / "out", options=ONE), 9)
    data = partial_of(tmp_path / "out") / "release" / "__0_1.distcp"
    dtype = None
    if change == "source":
        make_model("qwen3", tmp_path / "hf", seed=5)  # as large as the one before
        os.utime(source / "model.safetensors", (1, 1))
    elif change == "dtype":
        dtype = "bf16"
    elif change == "a file is gone":
        data.unlink()
    else:
        os.truncate(data, data.stat().st_size - 1)
    assert hf_to_megatron(source, tmp_path / "out", dtype, options=ONE).resumed == 0
    hf_to_megatron(source, tmp_path / "whole", dtype, options=ONE)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_an_export_into_other_files_is_not_gone_on_with(tmp_path):
    source = make_model("qwen3", tmp_path / "hf")
    hf_to_megatron(source, tmp_path / "converted")
    kill_after_tensors(lambda: megatron_to_hf(tmp_path / "converted", tmp_path / "out", options=ONE), 9)
    assert megatron_to_hf(tmp_path / "converted", tmp_path / "out", max_shard_bytes=10**5, options=ONE).resumed == 0
    assert_same_tensors(tmp_path / "out", source)


def test_two_processes_at_once_are_refused(tmp_path):
    source = make_model("qwen3", tmp_path / "hf")
    pid = kill_after_tensors(lambda: hf_to_megatron(source, tmp_path / "out", options=ONE), 9, signal.SIGSTOP)
    try:
        with pytest.raises(Refused, match="is being written by another process; wait for it to end, or name another folder"):
            hf_to_megatron(source, tmp_path / "out", options=ONE)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert hf_to_megatron(source, tmp_path / "out", options=ONE).resumed == 9


def test_another_process_is_refused_until_the_folder_has_its_name(tmp_path, monkeypatch):
    first = Unfinished(tmp_path / "out")
    (first.folder / "weights").write_text("whole")
    refusals = []

    def look_on(path: Path) -> None:
        with pytest.raises(Refused) as refusal:
            Unfinished(tmp_path / "out")
        refusals.append(str(refusal.value))

    monkeypatch.setattr(unfinished, "sync", look_on)
    first.finish()
    assert "is being written by another process" in refusals[0]
    assert "exists and is not an empty folder" in refusals[-1]
    assert hashes(tmp_path / "out").keys() == {"weights"}


def test_a_journal_of_half_a_line_loses_no_line_after_it(tmp_path):
    source = make_model("qwen3", tmp_path / "hf")
    kill_after_tensors(lambda: hf_to_megatron(source, tmp_path / "out", options=ONE), 5)
    with (partial_of(tmp_path / "out") / NAME).open("a") as journal:
        journal.write('{"tensor": "model.norm.wei')
    kill_after_tensors(lambda: hf_to_megatron(source, tmp_path / "out", options=ONE), 11)
    assert hf_to_megatron(source, tmp_path / "out", options=ONE).resumed == 11
