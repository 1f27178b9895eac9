"""Sums over a trace, of events made by hand: nesting, threads, a device. Real traces: tests/train/test_profile.py."""

import gzip
import json

import pytest

from megapsft.platform.trace import read_trace


def event(cat, name, begin, end, tid=1, pid=1):
    """Microseconds."""
    return {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": begin, "dur": end - begin}


HOST = [
    event("user_annotation", "step 2", 0, 1000),
    event("user_annotation", "optimizer", 600, 900),
    event("user_annotation", "head", 100, 200, tid=2),  # of a backward pass, in a thread of its own
    event("user_annotation", "step 3", 1000, 1500),
    event("cpu_op", "aten::linear", 10, 110),
    event("cpu_op", "aten::mm", 20, 100),
    event("cpu_op", "aten::mm", 120, 160),
    {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}},
]
DEVICE = [
    event("gpu_user_annotation", "step 2", 50, 1100, pid=0),
    event("gpu_user_annotation", "optimizer", 700, 1000, pid=0),
    event("kernel", "gemm", 60, 460, pid=0, tid=7),
    event("kernel", "gemm", 500, 600, pid=0, tid=7),
    event("gpu_memcpy", "Memcpy DtoH", 300, 310, pid=0, tid=8),
]


def read(path, events):
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        json.dump({"traceEvents": events}, file)
    trace = read_trace(path)
    return trace, {one.name: one for one in (*trace.ranges, *trace.operators)}


def test_ranges_lie_in_one_another_on_each_thread(tmp_path):
    trace, found = read(tmp_path / "trace.json", HOST)
    assert trace.seconds == pytest.approx(1500e-6)
    assert [one.name for one in trace.ranges] == ["step", "optimizer", "head"]
    assert (found["step"].calls, found["step"].seconds) == (2, pytest.approx(1500e-6))
    assert found["step"].self_seconds == pytest.approx(1200e-6)  # less the optimizer, not the head of the other thread
    assert found["head"].self_seconds == pytest.approx(100e-6)
    assert found["step"].device_seconds == 0


def test_operators_are_those_of_the_host_by_what_they_take_themselves(tmp_path):
    trace, found = read(tmp_path / "trace.json.gz", HOST)
    assert [one.name for one in trace.operators] == ["aten::mm", "aten::linear"]
    assert (found["aten::mm"].calls, found["aten::mm"].self_seconds) == (2, pytest.approx(120e-6))
    assert found["aten::linear"].seconds == pytest.approx(100e-6)
    assert found["aten::linear"].self_seconds == pytest.approx(20e-6)


def test_operators_of_a_device_come_first_where_there_is_one(tmp_path):
    trace, found = read(tmp_path / "trace.json.gz", HOST + DEVICE)
    assert [one.name for one in trace.operators] == ["gemm", "Memcpy DtoH"]
    assert (found["gemm"].calls, found["gemm"].self_seconds) == (2, pytest.approx(500e-6))
    assert found["optimizer"].device_seconds == pytest.approx(300e-6)
    assert found["step"].device_seconds == pytest.approx(1050e-6)
